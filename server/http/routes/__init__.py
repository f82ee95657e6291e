"""The endpoints. Each has a file here and a line in `ROUTERS`."""

from __future__ import annotations

from fastapi import APIRouter

from server.http.routes.admin import router as admin
from server.http.routes.chat import router as chat
from server.http.routes.completions import router as completions
from server.http.routes.docs import router as docs
from server.http.routes.generate import router as generate
from server.http.routes.health import router as health
from server.http.routes.invocations import router as invocations
from server.http.routes.messages import router as messages
from server.http.routes.metrics import router as metrics
from server.http.routes.models import router as models
from server.http.routes.responses import router as responses
from server.http.routes.tokens import router as tokens
from server.http.routes.version import router as version

ROUTERS: tuple[APIRouter, ...] = (
    chat,
    completions,
    generate,
    invocations,
    responses,
    messages,
    models,
    tokens,
    health,
    version,
    metrics,
    docs,
    admin,
)
