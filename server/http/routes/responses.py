"""POST /v1/responses; GET and DELETE /v1/responses/{id}; POST /v1/responses/{id}/cancel."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.render_responses import ResponsesRenderer
from server.generation.responses import answer_of, chat_of_response, conversation_of
from server.http.access import caller_of
from server.http.body import read_body
from server.http.middleware import record_of
from server.http.order import Later, Order
from server.http.protocol.errors import ErrorResponse, bad_request
from server.http.protocol.openapi import describe
from server.http.protocol.responses import ResponseBody, ResponseDeleted, ResponseEvent, ResponseObject
from server.http.reply import GenerationReply
from server.services import services_of

router = APIRouter(tags=["generation"])

_LOST: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorResponse, "description": "It is not stored here."},
    "4XX": {"model": ErrorResponse},
}


@router.post(
    "/v1/responses",
    summary="Answer a conversation, in OpenAI's newer form",
    response_class=Response,
    **describe(body=ResponseBody, whole=ResponseObject, chunk=ResponseEvent, done=False),
)
async def create_response(request: Request) -> Response:
    """Answer a conversation. The schema is OpenAI's, with extensions for sparse attention."""
    services = services_of(request)
    request_id = record_of(request.scope).request_id
    key = caller_of(request.scope).name

    async def prepare(request: Request) -> Order:
        body, notices = await read_body(request, ResponseBody)
        if body.background and body.store is False:
            raise bad_request("background can only be used when `store` is true", param="background")
        if body.background and body.stream:
            raise bad_request("background needs stream to be false", param="background")
        kept = None
        if body.previous_response_id is not None:
            kept = services.responses.get(body.previous_response_id, key)
            if kept is None:
                raise bad_request(
                    "previous_response_id is not the id of a response that is stored here; send the whole conversation",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
        messages = conversation_of(body, kept)
        work = await services.intake.chat(
            chat_of_response(body, messages), services.engine.status, request_id
        )

        def keep(response: ResponseObject) -> None:
            if body.store is not False:
                services.responses.add(key, response, [*messages, *answer_of(response.output)])

        renderer = ResponsesRenderer(
            services.head(f"resp_{request_id}", [*notices, *work.notices]),
            body,
            keep,
            services.text,
            work.jobs[0].submit.prompt_token_ids,
        )
        later = None
        if body.background:
            queued = renderer.waiting("queued")
            services.responses.add(key, queued, messages)
            later = Later(
                queued.id,
                queued,
                lambda error: services.responses.add(key, renderer.failed(error), messages),
            )
        return Order(work, renderer, stream=bool(body.stream), later=later)

    return GenerationReply(services, prepare)


@router.get("/v1/responses/{response_id}", summary="Return a stored response", responses=_LOST)
async def retrieve_response(response_id: str, request: Request) -> ResponseObject:
    """The response with that id, if it is stored still, and the same key made it."""
    return services_of(request).responses.find(response_id, caller_of(request.scope).name).response


@router.post(
    "/v1/responses/{response_id}/cancel",
    summary="End a response that is made in the background",
    responses=_LOST,
)
async def cancel_response(response_id: str, request: Request) -> ResponseObject:
    """End the work for a response. One that is complete stays as it is."""
    services, key = services_of(request), caller_of(request.scope).name
    kept = services.responses.find(response_id, key)
    if not kept.response.background:
        raise bad_request("Cannot cancel a synchronous response.", param="response_id")
    if await services.background.cancel(response_id):
        ended = kept.response.model_copy(update={"status": "cancelled"})
        services.responses.add(key, ended, kept.messages)
    return services.responses.find(response_id, key).response


@router.delete("/v1/responses/{response_id}", summary="Forget a stored response", responses=_LOST)
async def delete_response(response_id: str, request: Request) -> ResponseDeleted:
    """Forget the response with that id, and end the work for it."""
    services, key = services_of(request), caller_of(request.scope).name
    services.responses.find(response_id, key)
    await services.background.cancel(response_id)
    services.responses.remove(response_id, key)
    return ResponseDeleted(id=response_id)
