"""One frozen object with everything that a route needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from engine.client import Engine
from server.config import ServerConfig
from server.generation.admission import Admission
from server.generation.intake import Intake
from server.lifecycle import Lifecycle
from server.money.accounting import Books
from server.telemetry.metrics import Metrics
from server.text.tokenizer import Tokenizer


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
    created: int = field(default_factory=lambda: int(time.time()))


def services_of(request: Request) -> Services:
    """The services of the app that got a request."""
    services = request.app.state.services
    assert isinstance(services, Services)
    return services
