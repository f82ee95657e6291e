"""Measurements for Prometheus; the only user of its client library.

Labels come from closed sets (endpoints, outcomes, kinds), never from what a client sends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from engine.client import EngineState, EngineStatus
from engine.protocol import EngineStats
from server.generate import Job, TextDelta

_TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
"""From under a millisecond (a small model on a large GPU) to a minute (a large one on a small CPU)."""

_REQUEST_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 7680.0),
)
"""From under a millisecond (a full prefix hit) to two hours (a long context behind a long queue)."""

ENGINE_COUNTERS = (
    ("steps_total", "dsa_engine_steps", "Steps that the engine ran."),
    ("prefill_tokens_total", "dsa_engine_prefill_tokens", "Prompt tokens computed, recomputation included."),
    ("decode_tokens_total", "dsa_engine_decode_tokens", "Output tokens computed."),
    ("preemptions_total", "dsa_preemptions", "Requests set back to make room for others."),
    (
        "prefix_queries_total",
        "dsa_prefix_cache_queries_tokens",
        "Prompt tokens looked up in the prefix cache.",
    ),
    ("prefix_hits_total", "dsa_prefix_cache_hits_tokens", "Prompt tokens found in the prefix cache."),
    ("draft_tokens_total", "dsa_spec_decode_draft_tokens", "Tokens guessed ahead, and verified."),
)
"""Field of the engine's stats, name and help of what is exposed."""


class EngineTotals:
    """The engine's counters over all engine processes: they begin at 0 in each, and never fall here.

    What an engine did between the last look and its death is not counted.

    Attributes:
        stale: the newest snapshot is still that of an engine that is gone.
    """

    def __init__(self) -> None:
        self._before = EngineStats()
        self._last = EngineStats()
        self._pid: int | None = None
        self.stale = False

    def update(self, status: EngineStatus) -> EngineStats:
        """Take in a snapshot; return the totals. Only the `_total` fields have a meaning."""
        stats = status.stats
        if status.pid != self._pid:
            self._pid = status.pid
            self.stale = True
        # A new engine has no stats before it is ready and has run a step; until then they are the old
        # one's, and must not be counted twice.
        fresh = self.stale and status.state is EngineState.READY and stats != self._last
        fell = any(getattr(stats, name) < getattr(self._last, name) for name, _, _ in ENGINE_COUNTERS)
        if fell or fresh:
            self._before = self._sum(self._before, self._last)
            self.stale = False
        self._last = stats
        return self._sum(self._before, self._last)

    @staticmethod
    def _sum(one: EngineStats, other: EngineStats) -> EngineStats:
        sums: dict[str, int | tuple[int, ...]] = {
            name: getattr(one, name) + getattr(other, name) for name, _, _ in ENGINE_COUNTERS
        }
        lengths = zip_longest(one.draft_lengths_total, other.draft_lengths_total, fillvalue=0)
        sums["draft_lengths_total"] = tuple(a + b for a, b in lengths)
        return msgspec.structs.replace(other, **sums)


class _EngineCollector(Collector):
    """Reads the engine's status whenever metrics are scraped."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus]) -> None:
        self._model_name = model_name
        self._status = status
        self._totals = EngineTotals()

    def update(self) -> None:
        self._totals.update(self._status())

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        totals = self._totals.update(status)
        up = status.state is EngineState.READY
        stats = status.stats if up and not self._totals.stale else EngineStats()  # what is gone holds nothing
        yield GaugeMetricFamily("dsa_requests_running", "Requests in the engine's steps.", stats.running)
        yield GaugeMetricFamily("dsa_requests_waiting", "Requests waiting in the engine.", stats.waiting)
        yield GaugeMetricFamily("dsa_engine_up", "1 when the engine takes requests.", float(up))
        yield CounterMetricFamily(
            "dsa_engine_restarts", "Engine processes started after one died.", status.restarts
        )
        pages = GaugeMetricFamily(
            "dsa_kv_pages", "Pages of keys and values: held, kept for prefix hits, free.", labels=["state"]
        )
        pages.add_metric(["used"], stats.pages_used)
        pages.add_metric(["cached"], stats.pages_cached)
        pages.add_metric(["free"], stats.pages_free)
        yield pages
        total = stats.pages_used + stats.pages_cached + stats.pages_free
        yield GaugeMetricFamily(
            "dsa_kv_cache_usage_ratio",
            "Share of pages that requests hold, 0 to 1.",
            stats.pages_used / total if total else 0.0,
        )
        for field, name, text in ENGINE_COUNTERS:
            yield CounterMetricFamily(name, text, getattr(totals, field))
        yield from _drafts(totals.draft_lengths_total)
        yield self._info(status)

    def _info(self, status: EngineStatus) -> Metric:
        labels = {"model": self._model_name}
        if (model := status.model) is not None:
            labels |= {
                "architecture": model.architecture,
                "parameters": str(model.num_parameters),
                "max_model_len": str(model.max_model_len),
                "device": model.device,
                "dtype": model.dtype,
                "indexer": model.indexer.source if model.indexer else "none",
            }
        if (capacity := status.capacity) is not None:
            labels |= {"block_size": str(capacity.page_size), "num_gpu_blocks": str(capacity.num_pages)}
        info = GaugeMetricFamily("dsa_model_info", "What is served; always 1.", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        return info


def _drafts(lengths: Sequence[int]) -> Iterator[Metric]:
    """What held of the drafts; `lengths[n]` counts the drafts of which n tokens did."""
    accepted = sum(n * count for n, count in enumerate(lengths))
    yield CounterMetricFamily(
        "dsa_spec_decode_accepted_tokens", "Tokens guessed ahead that were right.", accepted
    )
    buckets = [(str(float(n)), sum(lengths[: n + 1])) for n in range(len(lengths) or 1)]
    histogram = HistogramMetricFamily(
        "dsa_spec_decode_accepted_length",
        "Right guesses in a row, of one request in one step; it got one token more than that.",
    )
    histogram.add_metric([], [*buckets, ("+Inf", sum(lengths))], accepted)
    yield histogram


class Metrics:
    """One app's measurements."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus]) -> None:
        self.registry = registry = CollectorRegistry()
        self._engine = _EngineCollector(model_name, status)
        registry.register(self._engine)
        self._requests = Counter(
            "dsa_requests",
            "Requests answered, by how they ended.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self._tokens = Counter(
            "dsa_tokens",
            "Tokens of requests: prompt tokens computed or reused, and output tokens.",
            ["kind"],
            registry=registry,
        )
        for kind in ("prompt_computed", "prompt_cached", "completion"):
            self._tokens.labels(kind)
        self._first_token = self._histogram(
            "dsa_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _REQUEST_BUCKETS,
        )
        self._per_token = self._histogram(
            "dsa_time_per_output_token_seconds",
            "Mean time between the tokens of one choice, after its first.",
            _TOKEN_BUCKETS,
        )
        self._latency = self._histogram(
            "dsa_e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_BUCKETS
        )
        self._queue = self._histogram(
            "dsa_request_queue_seconds", "From submission to the engine to the first step.", _REQUEST_BUCKETS
        )

    def request_ended(self, endpoint: str, outcome: str) -> None:
        """Count a request of any endpoint."""
        self._requests.labels(endpoint, outcome).inc()
        self._engine.update()  # so that little is lost when an engine dies between two scrapes

    def expose(self, accept: str) -> tuple[bytes, str]:
        """Return everything in the format that an Accept header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def generation(self, jobs: Sequence[Job], started: float) -> GenerationMeter:
        """Measure one generating request that arrived at `started` on the monotonic clock."""
        return GenerationMeter(self, jobs, started)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, buckets=buckets, registry=self.registry)


class GenerationMeter:
    """Measures one generating request while its deltas pass by."""

    def __init__(self, metrics: Metrics, jobs: Sequence[Job], started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._prompts = {job.index: len(job.submit.prompt_token_ids) for job in jobs}
        self._first: dict[int, float] = {}
        self._tokens = dict.fromkeys(self._prompts, 0)

    def delta(self, delta: TextDelta) -> None:
        """Take in what one choice produced."""
        now = time.monotonic()
        metrics = self._metrics
        if delta.token_ids:
            if not self._first:
                metrics._first_token.observe(now - self._started)
            self._first.setdefault(delta.index, now)
            self._tokens[delta.index] += len(delta.token_ids)
            metrics._tokens.labels("completion").inc(len(delta.token_ids))
        if (usage := delta.usage) is None:
            return
        # A stop token is among the tokens used, but not among those given out.
        rest = max(usage.completion_tokens - self._tokens[delta.index], 0)
        metrics._tokens.labels("completion").inc(rest)
        metrics._tokens.labels("prompt_cached").inc(usage.cached_tokens)
        metrics._tokens.labels("prompt_computed").inc(self._prompts.pop(delta.index) - usage.cached_tokens)
        if usage.queue_seconds is not None:
            metrics._queue.observe(max(usage.queue_seconds, 0.0))
        if (tokens := usage.completion_tokens) > 1 and delta.index in self._first:
            metrics._per_token.observe((now - self._first[delta.index]) / (tokens - 1))

    def close(self, *, complete: bool) -> None:
        """End, after all choices or before."""
        for index, tokens in self._prompts.items():  # those that were cut short
            self._metrics._tokens.labels("prompt_computed").inc(tokens if index in self._first else 0)
        if complete:
            self._metrics._latency.observe(time.monotonic() - self._started)
