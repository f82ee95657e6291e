"""Reads a request's body, and decides what becomes of fields that are not known."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request

from server.http.protocol.base import Body
from server.http.protocol.errors import draining
from server.http.protocol.notices import Notice
from server.http.protocol.validation import parse_body, refused, unknown_fields
from server.services import services_of

B = TypeVar("B", bound=Body)


async def read_body(request: Request, model: type[B]) -> tuple[B, list[Notice]]:
    """Return the body, and what its answer has to say about it.

    A field that is not known does not end an existing client: it is counted, and the answer's `warnings` name it.
    `--unknown-fields refuse` makes it a 400.

    Raises:
        ApiError: the body is not JSON or not valid; the message says what to change.
    """
    services = services_of(request)
    raw = await services.lifecycle.unless_draining(request.body())
    if raw is None:
        raise draining()
    body = parse_body(model, request.headers.get("content-type"), raw)
    unknown = unknown_fields(body)
    if not unknown:
        return body, []
    if services.config.unknown_fields == "refuse":
        raise refused(unknown[0])
    services.metrics.unknown_fields(len(unknown))
    return body, [
        Notice(code="unknown_field", message=f"{field.message}; it had no effect", param=field.path)
        for field in unknown
    ]
