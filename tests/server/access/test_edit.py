"""Making and revoking keys: the file after each step, and that the secret is nowhere but in the answer."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.access.edit import add_key, revoke_key
from server.access.keys import KeyBook, KeysError, read_keys


@pytest.mark.parametrize("name", ["keys.yaml", "keys.json"])
def test_a_key_lives_and_dies(tmp_path: Path, name: str) -> None:
    path = tmp_path / "etc" / name
    first = add_key(path, "alice")
    admin = add_key(path, "root", role="admin")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert first not in path.read_text()
    second = add_key(path, "alice", again=True)
    book = KeyBook(path)
    found = [book.find(secret) for secret in (first, second, admin)]
    assert [record and (record.name, record.role) for record in found] == [
        ("alice", "user"),
        ("alice", "user"),
        ("root", "admin"),
    ]
    assert revoke_key(path, "alice", old=True) == 1
    book.refresh()
    assert (book.find(first), book.find(second) is not None) == (None, True)
    assert revoke_key(path, "alice") == 1
    book.refresh()
    assert (book.find(second), book.find(admin) is not None) == (None, True)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    add_key(path, "alice")
    for sentence, work in (
        ("choose another name", lambda: add_key(path, "alice")),
        ("no key 'bob'", lambda: add_key(path, "bob", again=True)),
        ("no name for a key", lambda: add_key(path, "a b")),
        ("no name for a key", lambda: add_key(path, "other")),
        ("no key 'bob'", lambda: revoke_key(path, "bob")),
    ):
        with pytest.raises(KeysError, match=sentence):
            work()
    assert [record.name for record in read_keys(path).keys] == ["alice"]


def test_keys_made_at_once_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with ThreadPoolExecutor(8) as pool:
        secrets = list(pool.map(lambda number: add_key(path, f"k{number}"), range(16)))
    book = KeyBook(path)
    assert all(book.find(secret) for secret in secrets)
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.yaml"]
