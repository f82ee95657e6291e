"""Builds the application from its parts: services, middleware, routes and error handlers. `server.serve` runs it.

`app.state.lifecycle` is for the process that runs the application (`server.lifecycle.Lifecycle`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.client import Engine
from server.access.budget import Budgets
from server.access.keys import KeyBook
from server.access.limits import Limits
from server.canary import Canary
from server.chat import ChatFormat
from server.config import ServerConfig
from server.generation.admission import Admission
from server.generation.grammars import GrammarChecks
from server.generation.intake import Intake
from server.generation.responses import KeptResponses
from server.http.access import PROBES, AccessMiddleware
from server.http.hosts import HostMiddleware, allowed_hosts
from server.http.middleware import BodyLimitMiddleware, RecordMiddleware
from server.http.paths import PathMiddleware
from server.http.protocol.errors import ApiError, bad_request
from server.http.protocol.openapi import openapi_of
from server.http.quota import QUOTA_HEADERS
from server.http.routes import ROUTERS
from server.lifecycle import Lifecycle
from server.live import LiveSettings
from server.money.accounting import Books, Settlement
from server.money.ledger import Ledger
from server.money.pricing import DEFAULT_TABLE, PriceBook
from server.services import VERSION, Services, services_of
from server.telemetry.logs import AccessLog
from server.telemetry.metrics import Metrics
from server.telemetry.record import Ended
from server.telemetry.tracing import Tracing
from server.text.tokenizer import Tokenizer

FOLLOW_SECONDS = 2.0
"""The time between two checks of the files that may change: prices, keys."""


def create_app(config: ServerConfig, engine: Engine, text: Tokenizer, chat: ChatFormat) -> FastAPI:
    """Build the application around an engine, which its lifespan starts and stops.

    Args:
        config: the server's settings.
        engine: not started yet.
        text: the model's tokenizer.
        chat: the model's way of writing a conversation.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        try:
            await engine.start()  # the engine loads in the background; until then requests get 503
            tasks = [asyncio.create_task(_follow(files), name="files that may change")]
            if services.canary is not None:
                tasks.append(asyncio.create_task(services.canary.run(), name="canary"))
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
        finally:
            await engine.stop()
            await checks.close()
            books.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    observers: list[Callable[[Ended], None]] = [tracing] if tracing else []
    if config.log_format == "json":
        observers.append(AccessLog(text.decode if config.log_prompts else None))
    machine = None if config.machine_price is None else Decimal(config.machine_price)
    prices = PriceBook(
        DEFAULT_TABLE if config.prices is None else Path(config.prices).expanduser(),
        config.model_name,
        machine,
    )
    keys = None
    if config.keys is not None:
        keys = KeyBook(Path(config.keys).expanduser(), has_ledger=config.ledger is not None)
    files = [prices.refresh, *([] if keys is None else [keys.refresh])]
    checks = GrammarChecks(text)
    metrics = Metrics(config.model_name, lambda: engine.status, prices)
    ledger = None if config.ledger is None else Ledger(config.ledger, metrics.ledger_lost)
    budgets = None
    if keys is not None and ledger is not None:
        budgets = Budgets(ledger.spent, lambda: prices.table, config.model_name)

    def closed(entry: Settlement) -> None:
        metrics.closed(entry)
        if budgets is not None:
            budgets.charge(entry)

    books = Books(prices, ledger, config.model_name, closed, metrics.ledger_failed)
    limits = Limits()
    intake, admission = (
        Intake(config, text, chat, checks),
        Admission(config.max_queue, config.max_queue_tokens, config.max_queue_seconds),
    )
    services = Services(
        config=config,
        engine=engine,
        text=text,
        intake=intake,
        admission=admission,
        live=LiveSettings(config, admission, intake, prices),
        lifecycle=Lifecycle(),
        metrics=metrics,
        books=books,
        responses=KeptResponses(config.stored_responses),
        keys=keys,
        limits=limits,
        budgets=budgets,
        canary=Canary(engine, text, config.canary_interval, metrics.canary)
        if config.canary_interval
        else None,
    )
    app = FastAPI(
        title="dsa-serve",
        description="OpenAI-compatible inference with DeepSeek Sparse Attention.",
        version=VERSION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's page loads its program from a foreign host; ours is `routes.docs`
        redoc_url=None,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
        },
    )
    app.state.services = services
    app.state.lifecycle = services.lifecycle
    app.add_middleware(BodyLimitMiddleware, limit=config.max_body_bytes)
    app.add_middleware(
        AccessMiddleware, keys=keys, limits=limits, metrics=metrics, public_metrics=config.public_metrics
    )
    is_allowed = allowed_hosts(
        config.allowed_hosts, host=config.host, guarded=keys is not None or config.uds is not None
    )
    if is_allowed is not None:
        app.add_middleware(HostMiddleware, is_allowed=is_allowed)
    app.add_middleware(RecordMiddleware, metrics=metrics, observers=observers)
    if config.allow_origins != "none":
        app.add_middleware(
            CORSMiddleware,
            allow_origins=[origin.strip() for origin in config.allow_origins.split(",")],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", *QUOTA_HEADERS],
        )
    app.add_middleware(PathMiddleware)  # added last: the outermost
    for router in ROUTERS:
        app.include_router(router)
    app.openapi = openapi_of(  # type: ignore[method-assign]
        app,
        vocabulary=text.vocab_size,
        max_logprobs=config.max_logprobs,
        empty_prompts=text.adds_bos,
        open_paths=PROBES,
    )
    return app


async def _follow(files: Sequence[Callable[[], None]]) -> None:
    """Check again and again whether files were edited."""
    while True:
        await asyncio.sleep(FOLLOW_SECONDS)
        for refresh in files:
            await asyncio.to_thread(refresh)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    if error.status in (402, 413, 429, 503):
        services_of(request).metrics.rejected(error.detail.code)
    return error.to_response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: ("there is no such endpoint; GET /openapi.json lists them all", "not_found"),
        405: (f"this endpoint does not take {request.method}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), "http_error"))
    return ApiError(error.status_code, message, code=code, headers=error.headers).to_response(
        request.url.path
    )


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    param = str(problem["loc"][-1])
    return bad_request(f"{param}: {problem['msg']}", param=param, code="invalid_value").to_response(
        request.url.path
    )
