"""Changes a file of keys: adds a key, or takes one away. The `dsa keys` command is made of this."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import ValidationError

from server.access.keys import KeyRecord, KeysError, KeyTable, Role, digest_of, new_secret, read_keys


def add_key(path: Path, name: str, *, role: Role = "user", again: bool = False) -> str:
    """Make a key and write its digest into the file, which is made if it is missing. Returns the secret.

    Args:
        path: the file.
        name: of the caller.
        role: of the caller.
        again: the caller exists, and gets another secret beside the old ones.

    Raises:
        KeysError: the file or the name is not valid, or the caller exists and `again` is false, or the reverse.
    """
    with _locked(path):
        keys = list(read_keys(path).keys) if path.exists() else []
        secret = new_secret()
        known = next((record for record in keys if record.name == name), None)
        if (known is not None) != again:
            raise KeysError(
                f"there is no key {name!r} in {path} that could get another secret"
                if again
                else f"there is a key {name!r} in {path}; choose another name, or --again for another secret of this one"
            )
        if known is not None:
            changed = known.model_copy(update={"sha256": (*known.sha256, digest_of(secret))})
            keys[keys.index(known)] = changed
        else:
            made = datetime.now(UTC).replace(microsecond=0)
            try:
                keys.append(KeyRecord(name=name, sha256=(digest_of(secret),), role=role, created=made))
            except ValidationError as error:
                raise KeysError(
                    f"{name!r} is no name for a key; a name has 1 to 63 letters, digits, dots, dashes and underscores, and "
                    "is not anonymous, other or none"
                ) from error
        _write(path, keys)
        return secret


def revoke_key(path: Path, name: str, *, old: bool = False) -> int:
    """Take a key out of the file; with `old`, all its secrets but the newest. Returns how many secrets are not valid now.

    Raises:
        KeysError: there is no such key, or the file is not valid.
    """
    with _locked(path):
        keys = list(read_keys(path).keys)
        known = next((record for record in keys if record.name == name), None)
        if known is None:
            raise KeysError(f"there is no key {name!r} in {path}; dsa keys list shows all")
        if old:
            keys[keys.index(known)] = known.model_copy(update={"sha256": known.sha256[-1:]})
        else:
            keys.remove(known)
        _write(path, keys)
        return len(known.sha256) - old


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other editors out: two keys made at once must both be in the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise KeysError(f"the folder of {path} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: list[KeyRecord]) -> None:
    """Replace the file at once, readable for its owner only: a reader sees the old one or the new one."""
    content = KeyTable(keys=tuple(keys)).model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    as_json = path.suffix == ".json"
    text = json.dumps(content, indent=2) + "\n" if as_json else yaml.safe_dump(content, sort_keys=False)
    path = path.resolve()  # a link stays a link
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise KeysError(f"the file of keys {path} cannot be written: {error.strerror}") from error
