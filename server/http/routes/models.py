"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from fastapi import APIRouter, Request

from server.config import SamplingDefaults
from server.generation.prompts import model_not_found
from server.http.protocol.errors import ErrorResponse
from server.http.protocol.models import DefaultSampling, ModelList, ModelObject
from server.services import Services, services_of

router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List what is served")
async def list_models(request: Request) -> ModelList:
    """The one model that is served, once under each of its names. Answers while it loads, too."""
    services = services_of(request)
    return ModelList(data=[_model(services, name) for name in services.config.model_names])


@router.get(
    "/v1/models/{model_id:path}",
    summary="Describe one model",
    responses={
        404: {"model": ErrorResponse, "description": "It is not served here."},
        "4XX": {"model": ErrorResponse},
    },
)
async def retrieve_model(model_id: str, request: Request) -> ModelObject:
    """The model of that name."""
    services = services_of(request)
    if model_id not in services.config.model_names:
        raise model_not_found(model_id, services.config.model_names)
    return _model(services, model_id)


def _model(services: Services, name: str) -> ModelObject:
    model = services.engine.status.model
    return ModelObject(
        id=name,
        root=services.config.model_name,
        created=services.created,
        max_model_len=model.max_model_len if model else None,
        default_sampling=_told(services.config.sampling),
        random_weights=model is not None and model.random_weights,
        batch_invariant=model is not None and model.batch_invariant,
    )


def _told(sampling: SamplingDefaults) -> DefaultSampling:
    return DefaultSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k or None,
        min_p=sampling.min_p or None,
        repetition_penalty=None if sampling.repetition_penalty == 1 else sampling.repetition_penalty,
    )
