"""POST /v1/messages and POST /v1/messages/count_tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.messages import chat_of
from server.generation.render_messages import MessagesRenderer
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.order import Order
from server.http.protocol.errors import MESSAGES, MessagesErrorResponse
from server.http.protocol.messages import (
    CountTokensBody,
    MessageEvent,
    MessagesBody,
    OutputMessage,
    TokenCount,
)
from server.http.protocol.openapi import describe, describe_plain
from server.http.reply import GenerationReply
from server.services import services_of

router = APIRouter(tags=["generation"])


@router.post(
    MESSAGES,
    summary="Answer a conversation, in Anthropic's form",
    response_class=Response,
    **describe(
        body=MessagesBody, whole=OutputMessage, chunk=MessageEvent, error=MessagesErrorResponse, done=False
    ),
)
async def create_message(request: Request) -> Response:
    """Answer a conversation. The schema is Anthropic's, with extensions for sparse attention."""
    services = services_of(request)
    request_id = record_of(request.scope).request_id

    async def prepare(request: Request) -> Order:
        body, notices = await read_body(request, MessagesBody)
        work = await services.intake.chat(chat_of(body), services.engine.status, request_id)
        renderer = MessagesRenderer(
            services.head(f"msg_{request_id}", notices),
            prompt_tokens=len(work.jobs[0].submit.prompt_token_ids),
        )
        return Order(work, renderer, stream=bool(body.stream))

    return GenerationReply(services, prepare)


@router.post(
    f"{MESSAGES}/count_tokens",
    summary="Count the tokens of a conversation's prompt",
    response_class=Response,
    **describe_plain(body=CountTokensBody, answer=TokenCount, error=MessagesErrorResponse),
)
async def count_tokens(request: Request) -> Response:
    """Say how long the prompt of a conversation is."""
    services = services_of(request)
    body, notices = await read_body(request, CountTokensBody)
    count = TokenCount(input_tokens=len(await services.intake.prompts.chat(chat_of(body))))
    if notices:
        count = count.model_copy(update={"warnings": notices})
    return Response(count.model_dump_json(exclude_unset=True), media_type="application/json")
