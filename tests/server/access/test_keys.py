"""The file of keys: what is valid, what an edit does, and that no secret is told."""

from __future__ import annotations

import hmac
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.access.keys import (
    Caller,
    KeyBook,
    KeyRecord,
    KeysError,
    digest_of,
    new_secret,
    read_keys,
    unverified,
)
from tests.server.access.kit import write_keys

D = digest_of("x")


def test_a_key_is_found_by_any_of_its_secrets(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    digests = [digest_of("old"), digest_of("new")]
    path.write_text(json.dumps({"keys": [{"name": "a", "sha256": digests}, {"name": "b", "sha256": [D]}]}))
    book = KeyBook(path)
    found = [book.find(secret) for secret in ("old", "new", "x", "", "y", digests[0], "\udfff")]
    assert [record and record.name for record in found] == ["a", "a", "b", None, None, None, None]


def test_every_digest_is_compared_in_constant_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = KeyBook(write_keys(tmp_path / "keys.yaml", a={}, b={}, c={}))
    seen = []
    compare = hmac.compare_digest

    def noted(one: bytes, other: bytes) -> bool:
        seen.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    for secret in ("secret-a", "secret-c", "nobody's"):
        seen.clear()
        book.find(secret)
        assert len(set(seen)) == 3


def test_a_key_expires(tmp_path: Path) -> None:
    book = KeyBook(write_keys(tmp_path / "keys.yaml", a={"expires": "2026-05-01T00:00:00Z"}))
    assert book.find("secret-a", datetime(2026, 4, 30, 23, 59, tzinfo=UTC)) is not None
    assert book.find("secret-a", datetime(2026, 5, 1, tzinfo=UTC)) is None


def test_a_secret_has_256_bits_and_its_digest_is_plain_sha256() -> None:
    secrets = {new_secret() for _ in range(50)}
    assert len(secrets) == 50
    assert all(secret.startswith("sk-dsa-") and len(secret) == len("sk-dsa-") + 43 for secret in secrets)
    assert digest_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "wrong at its top"),
        ("keys: 1", "wrong at keys"),
        ("keys: [", "is not YAML in line 1"),
        ("keys: [{name: a, sha256: [secret-of-mine]}]", "wrong at keys.0.sha256.0: String should match"),
        (f"keys: [{{name: a, sha256: [{D}]}}, {{name: b, sha256: [{D}]}}]", "two keys have the same sha256"),
        (f"keys: [{{name: a, sha256: [{D}], colour: red}}]", "wrong at keys.0.colour"),
        (f"keys: [{{name: a/b, sha256: [{D}]}}]", "wrong at keys.0.name"),
        (f"keys: [{{name: anonymous, sha256: [{D}]}}]", "has a meaning of its own"),
        (f"keys: [{{name: key-0123456789abcdef, sha256: [{D}]}}]", "has a meaning of its own"),
        (f"keys: [{{name: a, sha256: [{D}], expires: 2026-01-01T00:00:00}}]", "needs a time zone"),
        ("keys: [{name: a, sha256: []}]", "wrong at keys.0.sha256"),
    ],
)
def test_a_bad_file_is_refused_without_its_content(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(KeysError, match=sentence) as caught:
        read_keys(path)
    assert "secret-of-mine" not in str(caught.value)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="dsa keys new"):
        KeyBook(tmp_path / "keys.yaml")


def test_an_edit_is_taken_and_a_broken_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys.yaml", a={})
    book = KeyBook(path)
    write_keys(path, a={}, b={})
    book.refresh()
    assert book.find("secret-b") is not None
    for broken in ("keys: [oops", "keys: [{}]", None):
        if broken is None:
            path.unlink()
        else:
            path.write_text(broken)
        book.refresh()
        assert (book.find("secret-a") is not None, book.find("secret-b") is not None) == (True, True)
        assert book.problem is not None
        assert "the keys from before stay in force" in caplog.text
    assert book.errors == 3
    write_keys(path, b={})
    book.refresh()
    assert (book.problem, book.find("secret-a")) == (None, None)


def test_a_file_that_everybody_may_write_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_keys(tmp_path / "keys.yaml", a={})
    os.chmod(path, 0o666)
    KeyBook(path)
    assert "chmod 600" in caplog.text


def test_without_keys_a_caller_is_a_digest() -> None:
    assert unverified(None) == unverified("") == Caller("anonymous")
    assert unverified("secret") == unverified("secret") != unverified("other")
    assert "secret" not in unverified("secret").name


def test_no_two_callers_share_a_salt() -> None:
    def caller(name: str, **more: Any) -> Caller:
        return Caller(name, KeyRecord(name=name, sha256=(D,), **more))

    callers = [
        Caller("anonymous"),
        unverified("x"),
        caller("a"),
        caller("shared"),
        caller("c", namespace="a"),
    ]
    salts = [one.salt(own) for one in callers for own in ("", "a", "a/", "+a", "/a")]
    assert len(set(salts)) == len(salts)
    assert Caller("anonymous").salt("") == ""
    assert caller("c", namespace="team").salt("x") == caller("d", namespace="team").salt("x")
