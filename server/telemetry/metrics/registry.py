"""The measurements of one app, with their names and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder

from engine.client import EngineStatus
from server.canary import CanaryOutcome
from server.generation.choice import Job
from server.money.accounting import Settlement
from server.money.pricing import PriceBook
from server.telemetry.metrics.callers import CallerCollector
from server.telemetry.metrics.cost import CostCollector
from server.telemetry.metrics.engine import EngineCollector
from server.telemetry.metrics.generation import GenerationMeter, GenerationMetrics

REJECTIONS = frozenset(
    "queue_full draining engine_unavailable body_too_large ledger_unavailable rate_limited invalid_api_key forbidden "
    "rate_limit_exceeded concurrency_limit budget_reserved budget_exhausted".split()
)
"""Reasons of rejection that have their own label; all others are `other`."""


class Metrics:
    """The measurements of one app."""

    def __init__(
        self, model_name: str, status: Callable[[], EngineStatus], prices: PriceBook | None = None
    ) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(EngineCollector(model_name, status))
        self._cost = CostCollector(prices)
        registry.register(self._cost)
        self.callers = CallerCollector()
        registry.register(self.callers)
        self._rejections = Counter(
            "dsa_rejections", "Requests refused before they ran, by reason.", ["reason"], registry=registry
        )
        for reason in (*sorted(REJECTIONS), "other"):
            self._rejections.labels(reason)
        self._ledger_errors = Counter(
            "dsa_ledger_errors", "Rows that the usage ledger could not take.", registry=registry
        )
        self._ledger_lost = Counter(
            "dsa_ledger_files_lost",
            "Times that the usage ledger's file was found removed or replaced.",
            registry=registry,
        )
        self._unknown = Counter(
            "dsa_unknown_fields", "Fields of requests that their endpoint does not know.", registry=registry
        )
        self._canary = Counter(
            "dsa_canary_runs", "Runs of the canary, by how they ended.", ["outcome"], registry=registry
        )
        for outcome in get_args(CanaryOutcome):
            self._canary.labels(outcome)
        self._requests = Counter(
            "dsa_requests",
            "Requests answered, by how they ended.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._generation = GenerationMetrics(registry)

    def request_ended(self, endpoint: str, outcome: str) -> None:
        """Count a request of any endpoint."""
        self._requests.labels(endpoint, outcome).inc()

    def rejected(self, reason: str | None) -> None:
        """Count a request that was refused before it ran."""
        self._rejections.labels(reason if reason in REJECTIONS else "other").inc()

    def canary(self, outcome: CanaryOutcome) -> None:
        """Count a run of the canary."""
        self._canary.labels(outcome).inc()

    def unknown_fields(self, count: int) -> None:
        """Count fields that an endpoint did not know."""
        self._unknown.inc(count)

    def closed(self, entry: Settlement) -> None:
        """Count the money of a request whose account was closed."""
        self._cost.closed(entry)
        self.callers.closed(entry)

    def ledger_failed(self) -> None:
        """Count a row that was not written."""
        self._ledger_errors.inc()

    def ledger_lost(self) -> None:
        """Count that the file of the ledger is not where it was. Any thread may call it."""
        self._ledger_lost.inc()

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the Accept header asks for, and the content type."""
        self._generation.gather()
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def generation(self, jobs: Sequence[Job], started: float) -> GenerationMeter:
        """Make the meter of one generating request, which arrived at `started` (monotonic clock, seconds)."""
        return GenerationMeter(self._generation, jobs, started)
