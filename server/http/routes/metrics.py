"""GET /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from server.services import services_of

router = APIRouter(tags=["metrics"])


@router.get("/metrics", summary="Measurements for Prometheus", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Everything that is measured, as text or, where asked for, as OpenMetrics."""
    content, content_type = services_of(request).metrics.expose(request.headers.get("accept", ""))
    return Response(content, headers={"content-type": content_type})
