"""POST /invocations: the name by which SageMaker calls a model. The body says which endpoint is meant."""

from __future__ import annotations

import json

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.http.protocol.errors import bad_request
from server.http.routes.chat import create_chat_completion
from server.http.routes.completions import create_completion
from server.services import services_of

router = APIRouter(tags=["generation"])


@router.post("/invocations", include_in_schema=False)
async def invoke(request: Request) -> Response:
    """Answer as /v1/chat/completions if the body has messages, as /v1/completions if it has a prompt."""
    raw = await services_of(request).lifecycle.unless_draining(request.body()) or b""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        body = None
    if isinstance(body, dict) and "messages" in body:
        return _Reread(await create_chat_completion(request), raw)
    if isinstance(body, dict) and "prompt" in body:
        return _Reread(await create_completion(request), raw)
    raise bad_request("the body must be a JSON object with messages or a prompt", code="invalid_body")


class _Reread(Response):
    """An endpoint's response, which reads the body that was read already."""

    def __init__(self, response: Response, raw: bytes) -> None:
        super().__init__()
        self._response = response
        self._messages: list[Message] = [{"type": "http.request", "body": raw, "more_body": False}]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def again() -> Message:
            return self._messages.pop() if self._messages else await receive()

        await self._response(scope, again, send)
