"""Reads a request's body, and decides what becomes of fields that are not known."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from fastapi import Request

from server.http.protocol.base import Body
from server.http.protocol.errors import bad_request, draining
from server.http.protocol.notices import Notice
from server.http.protocol.validation import UnknownField, parse_body, refused, unknown_fields
from server.http.size import too_many
from server.services import services_of

B = TypeVar("B", bound=Body)


SMALL_BYTES = 1 << 16
"""A larger body is counted before it is parsed, in a thread, so that streams and probes go on."""


def _parse(model: type[B], content_type: str | None, raw: bytes) -> tuple[B, list[UnknownField]]:
    if len(raw) > SMALL_BYTES and (problem := too_many(raw)) is not None:
        raise bad_request(problem, code="too_many_values")
    body = parse_body(model, content_type, raw)
    return body, unknown_fields(body)


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
    content_type = request.headers.get("content-type")
    if len(raw) <= SMALL_BYTES:
        body, unknown = _parse(model, content_type, raw)
    else:
        async with services.large_bodies:  # one at a time: each may hold the interpreter for a while
            body, unknown = await asyncio.to_thread(_parse, model, content_type, raw)
    if not unknown:
        return body, []
    if services.config.unknown_fields == "refuse":
        raise refused(unknown[0])
    services.metrics.unknown_fields(len(unknown))
    return body, [
        Notice(code="unknown_field", message=f"{field.message}; it had no effect", param=field.path)
        for field in unknown
    ]
