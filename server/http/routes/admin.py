"""GET and PATCH /admin/settings, GET /admin/changes. `server.http.access` lets only admins' keys through to them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from server.http.access import caller_of
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.protocol.admin import ChangeList, SettingsBody, SettingsNow
from server.http.protocol.errors import ErrorResponse, bad_request
from server.http.protocol.openapi import describe_plain
from server.money.pricing import PriceError
from server.services import services_of

router = APIRouter(tags=["admin"])

_CLOSED: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorResponse, "description": "No valid key was sent."},
    403: {"model": ErrorResponse, "description": "The key is no admin's, or the server has no keys."},
}


@router.get("/admin/settings", summary="Say which settings are in force", responses=_CLOSED)
async def settings(request: Request) -> SettingsNow:
    """The settings that may change while the server runs."""
    return services_of(request).live.now()


@router.patch(
    "/admin/settings",
    summary="Change settings while the server runs",
    **describe_plain(body=SettingsBody, answer=SettingsNow),
)
async def change_settings(request: Request) -> SettingsNow:
    """Change some settings until the server ends, and return all. All of the change holds, or nothing of it."""
    services = services_of(request)
    body, notices = await read_body(request, SettingsBody)
    if notices:  # to overlook a setting that is misspelt would be worse than to refuse it
        raise bad_request(
            notices[0].message.replace("; it had no effect", ""), param=notices[0].param, code="unknown_field"
        )
    try:
        services.live.change(
            body, key=caller_of(request.scope).name, request_id=record_of(request.scope).request_id
        )
    except PriceError as error:
        raise bad_request(str(error), param="prices", code="invalid_value") from None
    return services.live.now()


@router.get("/admin/changes", summary="Say who changed which setting", responses=_CLOSED)
async def changes(request: Request) -> ChangeList:
    """The newest changes since the start."""
    return ChangeList(data=list(services_of(request).live.changes))
