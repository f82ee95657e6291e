"""Server-sent events, as OpenAI frames them."""

from __future__ import annotations

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
