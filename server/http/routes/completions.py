"""POST /v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.render_completion import CompletionRenderer
from server.generation.streamed import shown_of
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.order import Order
from server.http.protocol.completions import Completion, CompletionBody
from server.http.protocol.openapi import describe
from server.http.reply import GenerationReply
from server.services import services_of

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    summary="Continue a text",
    response_class=Response,
    **describe(body=CompletionBody, whole=Completion, chunk=Completion),
)
async def create_completion(request: Request) -> Response:
    """Continue one or several prompts, at once or as a stream."""
    services = services_of(request)
    request_id = record_of(request.scope).request_id

    async def prepare(request: Request) -> Order:
        body, notices = await read_body(request, CompletionBody)
        work = await services.intake.completion(body, services.engine.status, request_id)
        renderer = CompletionRenderer(
            services.head(f"cmpl-{request_id}", notices),
            text=services.text,
            jobs=work.jobs,
            shown=shown_of(
                body,
                services.config,
                logprobs=len(body.logprob_token_ids) if body.logprob_token_ids else body.logprobs,
                echo=bool(body.echo),
            ),
            echoes=work.echoes,
        )
        return Order(work, renderer, stream=bool(body.stream))

    return GenerationReply(services, prepare)
