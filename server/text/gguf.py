"""Reads the metadata at the head of a GGUF file (strings, numbers, arrays). It does not read tensors.

The `gguf` package needs about three seconds for the metadata, because it makes a numpy view of every
token. The server must start quickly and needs only plain lists. Versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING = 8
_ARRAY = 9
_MAX_KEYS = 1 << 16


class GGUFError(ValueError):
    """The file cannot be read as GGUF; the message says why."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Return every key of the file's metadata.

    Raises:
        GGUFError: the file is not GGUF, has an unknown version, or is cut short.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise GGUFError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, path).metadata()
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise GGUFError(
                    f"{path} is damaged or cut short: its metadata cannot be read ({error})"
                ) from None


class _Reader:
    """A cursor over the file's bytes."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._at = 4
        self._path = path

    def metadata(self) -> dict[str, Any]:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise GGUFError(
                f"{self._path} is GGUF version {version}; versions 2 and 3 (little-endian) can be read: convert it again"
            )
        self._scalar("<Q")  # number of tensors
        keys = self._scalar("<Q")
        if keys > _MAX_KEYS:
            raise GGUFError(f"{self._path} is damaged: it claims to hold {keys} metadata keys")
        return {self._string(): self._value(self._scalar("<I")) for _ in range(keys)}

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        start = self._at + 8
        (length,) = struct.unpack_from("<Q", self._data, self._at)
        end = start + length
        if end > len(self._data):
            raise IndexError("a string ends past the end of the file")
        self._at = end
        return self._data[start:end].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise GGUFError(f"{self._path} is damaged: its metadata has a value of unknown type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind, count = self._scalar("<I"), self._scalar("<Q")
        if count > len(self._data):
            raise IndexError("an array is longer than the file")
        if kind in _SCALARS:
            form = f"<{count}{_SCALARS[kind][1]}"
            values = list(struct.unpack_from(form, self._data, self._at))
            self._at += struct.calcsize(form)
            return values
        return [self._value(kind) for _ in range(count)]
