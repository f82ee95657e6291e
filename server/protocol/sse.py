"""Server-sent events, as OpenAI frames them."""

from __future__ import annotations

from pydantic import BaseModel

MEDIA_TYPE = "text/event-stream"
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: clients skip it, and proxies see that the connection lives."""


def event(data: str) -> bytes:
    """One event. JSON never has a bare line break, so one `data:` line holds it."""
    return b"data: " + data.encode() + b"\n\n"


def chunk(model: BaseModel) -> bytes:
    """One event with an object; fields that were never set are left out."""
    return event(model.model_dump_json(exclude_unset=True))
