"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.render import ChatRenderer
from server.generation.streamed import shown_of
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.order import Order
from server.http.protocol.chat import ChatCompletion, ChatCompletionBody, ChatCompletionChunk
from server.http.protocol.openapi import describe
from server.http.reply import GenerationReply
from server.services import services_of

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_class=Response,
    **describe(body=ChatCompletionBody, whole=ChatCompletion, chunk=ChatCompletionChunk),
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, at once or as a stream."""
    services = services_of(request)
    request_id = record_of(request.scope).request_id

    async def prepare(request: Request) -> Order:
        body, notices = await read_body(request, ChatCompletionBody)
        work = await services.intake.chat(body, services.engine.status, request_id)
        renderer = ChatRenderer(
            services.head(f"chatcmpl-{request_id}", [*notices, *work.notices]),
            text=services.text,
            jobs=work.jobs,
            shown=shown_of(body, services.config),
            echoes=work.echoes,
        )
        return Order(work, renderer, stream=bool(body.stream))

    return GenerationReply(services, prepare)
