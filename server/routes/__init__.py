"""The endpoints: one file each, and one line each in `ROUTERS`."""

from __future__ import annotations

from fastapi import APIRouter

from server.routes.chat import router as chat
from server.routes.completions import router as completions
from server.routes.health import router as health
from server.routes.metrics import router as metrics
from server.routes.models import router as models

ROUTERS: tuple[APIRouter, ...] = (chat, completions, models, health, metrics)
