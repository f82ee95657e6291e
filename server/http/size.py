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

# A string; numbers with what stands between them; the beginning of a list or an object. A damaged string ends the count:
# the parser then stops there, too. The quantifiers are possessive, so no text takes more than one pass.
_PARTS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[0-9][0-9eE+.,\s-]*+|[\[{]|"', re.DOTALL)


def too_many(raw: bytes) -> str | None:
    """Say what a body has too many of; None: it is within the limits. Takes time in proportion to what it may hold."""
    values = numbers = 0
    for part in _PARTS.finditer(raw):
        start, end = part.span()
        if raw[start] in b'"[{':
            if end - start == 1 and raw[start] == 0x22:
                return None
            values += 1
            if values > MAX_VALUES:
                return f"the body has more than {MAX_VALUES} strings, lists and objects; send less in one request"
        else:
            numbers += 1 + raw.count(b",", start, end)
            if numbers > MAX_NUMBERS:
                return f"the body has more than {MAX_NUMBERS} numbers; send less in one request"
    return None
