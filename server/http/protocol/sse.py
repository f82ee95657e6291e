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
"""A comment line. Clients skip it; proxies see that the connection is in use."""


_BREAKS = str.maketrans({"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
"""Unicode's other line breaks, escaped. The protocol does not break lines there, but the line readers of many clients
do (`str.splitlines`, httpx)."""


def event(data: str) -> bytes:
    """Write JSON as one event. Compact JSON has no line breaks except Unicode's, inside strings; these are escaped."""
    return b"data: " + data.translate(_BREAKS).encode() + b"\n\n"


def chunk(model: BaseModel, name: str | None = None) -> bytes:
    """Write an object as one event, without the fields that were never set. `name` is the event's type."""
    data = event(model.model_dump_json(exclude_unset=True))
    return data if name is None else b"event: " + name.encode() + b"\n" + data


class TextEvent:
    """Writes events that differ only in one text. Almost every event of a stream is such an event.

    `chunk` writes the event once, with a random mark as the text. The bytes before and after the mark are then
    reused for every text.
    """

    def __init__(self, make: Callable[[str], BaseModel], name: str | None = None) -> None:
        """`make` returns the object for a text. The object must contain the text exactly once."""
        mark = secrets.token_hex(16)
        self._before, _, self._after = chunk(make(mark), name).partition(f'"{mark}"'.encode())

    def __call__(self, text: str) -> bytes:
        """Return the same bytes as `chunk(make(text), name)`."""
        if text.isascii():
            return self._before + msgspec.json.encode(text) + self._after
        return self._before + msgspec.json.encode(text).decode().translate(_BREAKS).encode() + self._after
