"""GET /health, /health/live, /health/ready and /ping."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from engine.client import EngineState
from server.generation.prompts import why_not_ready
from server.http.protocol.models import Liveness, LoadingProgress, Readiness
from server.services import services_of

router = APIRouter(tags=["health"])

QUIET_SECONDS = 10.0
"""A server whose engine makes no progress for so long is not ready. If that goes on, the engine is replaced."""


@router.get("/health/live", summary="Does the process answer?")
async def live() -> Liveness:
    """Whether the process answers; the engine's state is readiness."""
    return Liveness()


@router.get("/ping", summary="Does the process answer?")
@router.post("/ping", include_in_schema=False)
async def ping() -> Liveness:
    """The same as /health/live, under the name that SageMaker calls."""
    return Liveness()


@router.get(
    "/health",
    summary="Are requests taken?",
    responses={503: {"model": Readiness, "description": "Not now; `reason` says why."}},
)
@router.get(
    "/health/ready",
    summary="Are requests taken?",
    responses={503: {"model": Readiness, "description": "Not now; `reason` says why."}},
)
async def ready(request: Request, response: Response) -> Readiness:
    """Whether requests are taken now, and why not."""
    services = services_of(request)
    status = services.engine.status
    state, reason = status.state.value, None
    if services.lifecycle.draining:
        state, reason = "draining", "the server is shutting down and finishes what runs"
    elif status.state is not EngineState.READY:
        reason = why_not_ready(status)
    elif status.quiet_seconds > QUIET_SECONDS:
        state, reason = "stalled", f"the engine has made no progress for {status.quiet_seconds:.0f} s"
    ledger = services.books.ledger
    warnings = [] if services.keys is None or services.keys.problem is None else [services.keys.problem]
    if services.canary is not None and services.canary.problem is not None:
        # Requests are taken still: a fault of the software would take every server away at once.
        warnings.append(services.canary.problem)
    if ledger is not None and ledger.problem is not None:
        said = f"the usage ledger cannot be written, and {ledger.waiting} rows wait for it: {ledger.problem}"
        if reason is None and ledger.behind:
            state, reason = "ledger", said
        else:
            warnings.append(said)
    loading = status.loading if status.state is not EngineState.READY else None
    if reason is not None:
        response.status_code = 503
    return Readiness(
        ready=reason is None,
        state=state,
        model=services.config.model_name,
        reason=reason,
        loading=LoadingProgress(stage=loading.stage, done=loading.done, total=loading.total)
        if loading
        else None,
        warnings=warnings,
    )
