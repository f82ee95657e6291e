"""Sizes as people write them: 512MiB, 1GiB, or a number of bytes."""

from __future__ import annotations

import re

_UNITS = {"": 1} | {
    f"{letter}{binary}": (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for binary in ("", "i")
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)


class SizeError(ValueError):
    """A text is no size; the message is one sentence that says which one, and what it may be."""


def parse_size(text: str, name: str) -> int:
    """Return the bytes of "1GiB", "512 MB" or "1048576".

    Args:
        text: what was written.
        name: what the error calls it.

    Raises:
        SizeError: it is none of those, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise SizeError(f"{name} is {text!r}; expected a size such as 512MiB, 1GiB or a number of bytes")
    return size


def size_text(size: int) -> str:
    """Write bytes as `parse_size` reads them, in the largest unit that divides them."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)
