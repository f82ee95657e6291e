"""One frozen object with everything that a route needs."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastapi import Request

from engine.client import Engine
from server.access.budget import Budgets
from server.access.keys import KeyBook
from server.access.limits import Limits
from server.canary import Canary
from server.config import ServerConfig
from server.generation.admission import Admission
from server.generation.background import Background
from server.generation.intake import Intake
from server.generation.responses import KeptResponses
from server.generation.streamed import Head
from server.http.protocol.notices import Notice
from server.lifecycle import Lifecycle
from server.live import LiveSettings
from server.money.accounting import Books
from server.telemetry.metrics import Metrics
from server.text.tokenizer import Tokenizer

VERSION = "0.1.0"


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one app."""

    config: ServerConfig
    engine: Engine
    text: Tokenizer
    intake: Intake
    admission: Admission
    lifecycle: Lifecycle
    metrics: Metrics
    books: Books
    live: LiveSettings
    responses: KeptResponses
    canary: Canary | None = None
    background: Background = field(default_factory=Background)
    keys: KeyBook | None = None
    limits: Limits = field(default_factory=Limits)
    budgets: Budgets | None = None
    large_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, response_id: str, notices: Sequence[Notice]) -> Head:
        """Make what every object of a new answer has."""
        return Head(
            id=response_id,
            created=int(time.time()),
            model=self.config.model_name,
            fingerprint=self.fingerprint(),
            notices=notices,
        )

    def fingerprint(self) -> str:
        """A short digest of the server's version, the model and how it computes."""
        parts = (VERSION, self.config.model_name, str(self.engine.status.model))
        return f"fp_{hashlib.blake2b('/'.join(parts).encode(), digest_size=5).hexdigest()}"


def services_of(request: Request) -> Services:
    """The services of the app that got a request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
