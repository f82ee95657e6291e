"""POST /inference/v1/generate."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.render_generate import GenerateRenderer
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.order import Order
from server.http.protocol.completions import CompletionBody
from server.http.protocol.errors import bad_request
from server.http.protocol.generate import GenerateBody, Generated
from server.http.protocol.openapi import describe_plain
from server.http.reply import GenerationReply
from server.services import services_of

router = APIRouter(tags=["generation"])


@router.post(
    "/inference/v1/generate",
    summary="Continue token ids with token ids, as vLLM has it",
    response_class=Response,
    **describe_plain(body=GenerateBody, answer=Generated, generates=True),
)
async def generate(request: Request) -> Response:
    """Continue token ids. What /v1/completions does with `return_token_ids`, without a text."""
    services = services_of(request)
    request_id = record_of(request.scope).request_id

    async def prepare(request: Request) -> Order:
        body, notices = await read_body(request, GenerateBody)
        wanted = body.sampling_params
        if wanted.stop and wanted.detokenize is False:
            raise bad_request(
                "sampling_params.stop needs detokenize to be true: stop strings are looked for in the text",
                param="sampling_params.stop",
            )
        fields = {
            name: getattr(wanted, name)
            for name in wanted.model_fields_set & CompletionBody.model_fields.keys()
        }
        fields |= {
            name: value for name in ("model", "cache_salt", "priority") if (value := getattr(body, name))
        }
        completion = CompletionBody.model_construct(**(fields | {"prompt": body.token_ids, "stream": None}))
        work = await services.intake.completion(completion, services.engine.status, request_id)
        return Order(work, GenerateRenderer(services.head(f"generate-{request_id}", notices)), stream=False)

    return GenerationReply(services, prepare)
