"""POST /tokenize, POST /detokenize and GET /tokenizer_info."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.http.body import read_body
from server.http.protocol.openapi import describe_plain
from server.http.protocol.tokens import DetokenizeBody, Detokenized, TokenizeBody, Tokenized, TokenizerInfo
from server.services import services_of

router = APIRouter(tags=["tokens"])


@router.post(
    "/tokenize",
    summary="Turn a text or a conversation into token ids",
    response_class=Response,
    **describe_plain(body=TokenizeBody, answer=Tokenized),
)
async def tokenize(request: Request) -> Response:
    """Return the token ids of a text, or of the prompt that a conversation becomes."""
    services = services_of(request)
    body, notices = await read_body(request, TokenizeBody)
    token_ids = await services.intake.prompts.tokenize(body)
    model = services.engine.status.model
    answer = Tokenized(
        count=len(token_ids),
        max_model_len=model.max_model_len if model else None,
        tokens=list(token_ids),
        token_strs=None,
    )
    if body.return_token_strs:
        strings = [services.text.piece(token_id) for token_id in token_ids]
        answer = answer.model_copy(update={"token_strs": strings})
    if notices:
        answer = answer.model_copy(update={"warnings": notices})
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


@router.post(
    "/detokenize",
    summary="Turn token ids into a text",
    response_class=Response,
    **describe_plain(body=DetokenizeBody, answer=Detokenized),
)
async def detokenize(request: Request) -> Response:
    """Return the text of token ids; control tokens are written out."""
    services = services_of(request)
    body, notices = await read_body(request, DetokenizeBody)
    answer = Detokenized(prompt=services.intake.prompts.detokenize(body))
    if notices:
        answer = answer.model_copy(update={"warnings": notices})
    return Response(answer.model_dump_json(exclude_unset=True), media_type="application/json")


@router.get("/tokenizer_info", summary="What are the tokenizer and the chat template?")
async def tokenizer_info(request: Request) -> TokenizerInfo:
    """Describe the tokenizer, for clients that count tokens or write prompts by themselves."""
    return services_of(request).intake.prompts.describe()
