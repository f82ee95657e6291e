"""Counts what a large JSON body holds before it is parsed, so that parsing it cannot stop the server.

The JSON parser holds the interpreter for the whole of a body. A few megabytes of `[],` are millions of objects, and take
it for seconds; the same bytes of text take it for milliseconds. So it is the number of values that needs a bound. The
parser itself bounds the depth (200) and the length of a number (4,300 digits).
"""

from __future__ import annotations

import re

MAX_VALUES = 1 << 16
"""Strings, lists, objects and fields of one body."""

MAX_NUMBERS = 1 << 20
"""Numbers of one body: token ids."""

_PIECE = 1 << 16
"""Bytes that are looked at without a break: meanwhile no other thread runs."""

_PARTS = re.compile(rb'["0-9\[{]')
"""The beginning of a string, of numbers, of a list or of an object."""

# Possessive, so no text takes more than one pass.
_NUMBERS = re.compile(rb"[0-9eE+.,\s-]*+")
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_QUOTE = 0x22


def too_many(raw: bytes) -> str | None:
    """Say what a body has too many of; None: it is within the limits. Takes time in proportion to what it may hold."""
    values = numbers = at = 0
    while (part := _PARTS.search(raw, at)) is not None:
        start, end = part.span()
        if raw[start] in b'"[{':
            if raw[start] == _QUOTE and (end := _after_string(raw, end)) < 0:
                return None  # a damaged string ends the count: the parser then stops there, too
            values += 1
            if values > MAX_VALUES:
                return f"the body has more than {MAX_VALUES} strings, lists and objects; send less in one request"
        else:
            numbers += 1
            while (more := _after(_NUMBERS, raw, end)) > end:
                numbers += raw.count(b",", end, more)
                end = more
            if numbers > MAX_NUMBERS:
                return f"the body has more than {MAX_NUMBERS} numbers; send less in one request"
        at = end
    return None


def _after_string(raw: bytes, at: int) -> int:
    """Where a string ends whose text begins at `at`; -1: it does not."""
    while True:
        end = _after(_INSIDE, raw, at)
        if end < len(raw) and raw[end] == _QUOTE:
            return end + 1
        if end == at:
            return -1
        at = end


def _after(parts: re.Pattern[bytes], raw: bytes, at: int) -> int:
    """Where the parts that begin at `at` end, or a piece of them."""
    found = parts.match(raw, at, at + _PIECE)
    return at if found is None else found.end()
