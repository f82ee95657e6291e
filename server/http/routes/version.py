"""GET /version and GET /load."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.http.protocol.models import Load, Version
from server.services import VERSION, services_of

router = APIRouter(tags=["health"])


@router.get("/version", summary="Which version is this?")
async def version() -> Version:
    """The version of the server."""
    return Version(version=VERSION)


@router.get("/load", summary="How much work is there?")
async def load(request: Request) -> Load:
    """How many choices wait or run now."""
    return Load(server_load=services_of(request).admission.admitted)
