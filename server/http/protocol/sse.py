"""Server-sent events, as OpenAI frames them."""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec
from pydantic import BaseModel

MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, and proxies see that the connection lives."""


_BREAKS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Line breaks to Unicode and so to many clients' line readers (`str.splitlines`, httpx), though not to the protocol."""


def event(data: str) -> bytes:
    """One event of JSON, which has no bare line break but those of Unicode, and only in strings: they are escaped."""
    return b"data: " + data.translate(_BREAKS).encode() + b"\n\n"


def chunk(model: BaseModel) -> bytes:
    """One event with an object; fields that were never set are left out."""
    return event(model.model_dump_json(exclude_unset=True))


class TextEvent:
    """An event that is always the same but for one text: almost every event of a stream is of that kind.

    The plain way makes it once, around a mark; the parts before and after the mark serve all texts.
    """

    def __init__(self, make: Callable[[str], BaseModel]) -> None:
        """`make` gives the object for a text, which must be in it once."""
        mark = secrets.token_hex(16)
        self._before, _, self._after = chunk(make(mark)).partition(f'"{mark}"'.encode())

    def __call__(self, text: str) -> bytes:
        """The same bytes as `chunk(make(text))`."""
        if text.isascii():
            return self._before + msgspec.json.encode(text) + self._after
        return self._before + msgspec.json.encode(text).decode().translate(_BREAKS).encode() + self._after
