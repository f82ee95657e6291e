"""Measures generating requests from their deltas: tokens, and times between arrival, tokens and end."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.generation.choice import Job, TextDelta

_TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0),
)
"""Bounds in seconds: from under a millisecond (a small model on a large GPU) to a minute (a large one on a small CPU)."""

_REQUEST_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 2560.0, 7680.0),
)
"""Bounds in seconds: from under a millisecond (a full prefix hit) to two hours (a long context behind a long queue)."""


class GenerationMetrics:
    """Tokens and times of all generating requests of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, buckets=buckets, registry=registry)

        tokens = Counter(
            "dsa_tokens",
            "Tokens of requests: prompt tokens computed or reused, and output tokens.",
            ["kind"],
            registry=registry,
        )
        # The labels are looked up once, because a look-up takes a lock and every delta counts its tokens.
        self.prompt_computed = tokens.labels("prompt_computed")
        self.prompt_cached = tokens.labels("prompt_cached")
        self.first_token = histogram(
            "dsa_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            _REQUEST_BUCKETS,
        )
        self.per_token = histogram(
            "dsa_time_per_output_token_seconds",
            "Mean time between the tokens of one choice, after its first.",
            _TOKEN_BUCKETS,
        )
        self.latency = histogram(
            "dsa_e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_BUCKETS
        )
        self.queue = histogram(
            "dsa_request_queue_seconds", "From submission to the engine to the first step.", _REQUEST_BUCKETS
        )
        self.prefill = histogram(
            "dsa_request_prefill_seconds", "From the first step to the first token.", _REQUEST_BUCKETS
        )
        self.decode = histogram(
            "dsa_request_decode_seconds", "From the first token to the last.", _REQUEST_BUCKETS
        )
        self.loops = Counter(
            "dsa_token_loops",
            "Answers that end in a loop of the same tokens.",
            registry=registry,
        )
        self.between = Gaps()
        registry.register(self.between)
        self._completion = tokens.labels("completion")
        self.completion_tokens = 0  # since the last scrape

    def gather(self) -> None:
        """Bring the counters up to date, before a scrape."""
        self._completion.inc(self.completion_tokens)
        self.completion_tokens = 0


class Gaps(Collector):
    """The histogram of the times between deliveries. Only the event loop's thread may use it.

    Every token of every stream comes here. The library's histogram takes a lock and looks through all buckets.
    """

    def __init__(self) -> None:
        self._counts = [0] * (len(_TOKEN_BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one time."""
        self._counts[bisect_left(_TOKEN_BUCKETS, seconds)] += 1
        self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """Yield the metric of a scrape."""
        bounds = [*(str(bound) for bound in _TOKEN_BUCKETS), "+Inf"]
        yield HistogramMetricFamily(
            "dsa_inter_token_latency_seconds",
            "Between two deliveries of tokens of one choice.",
            buckets=list(zip(bounds, accumulate(self._counts), strict=True)),
            sum_value=self._sum,
        )


class GenerationMeter:
    """Measures one generating request from its deltas."""

    def __init__(self, metrics: GenerationMetrics, jobs: Sequence[Job], started: float) -> None:
        self._metrics = metrics
        self._started = started
        self._prompts = {job.index: len(job.submit.prompt_token_ids) for job in jobs}
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._tokens = dict.fromkeys(self._prompts, 0)

    def delta(self, delta: TextDelta, now: float) -> None:
        """Measure a delta of one choice, which arrived at `now`."""
        metrics, index = self._metrics, delta.index
        if count := len(delta.token_ids):
            if (last := self._last.get(index)) is not None:
                metrics.between.observe(now - last)
            else:
                if not self._first:
                    metrics.first_token.observe(now - self._started)
                self._first[index] = now
            self._last[index] = now
            self._tokens[index] += count
            metrics.completion_tokens += count
        if (usage := delta.usage) is None:
            return
        # The usage counts a stop token, but no delta contains it.
        rest = max(usage.completion_tokens - self._tokens[delta.index], 0)
        metrics.completion_tokens += rest
        metrics.prompt_cached.inc(usage.cached_tokens)
        metrics.prompt_computed.inc(self._prompts.pop(delta.index) - usage.cached_tokens)
        if usage.repeated_tokens is not None:
            metrics.loops.inc()
        if usage.queue_seconds is not None:
            metrics.queue.observe(max(usage.queue_seconds, 0.0))
        if usage.prefill_seconds is not None:
            metrics.prefill.observe(max(usage.prefill_seconds, 0.0))
        if delta.index in self._first:
            metrics.decode.observe(now - self._first[delta.index])
        if (tokens := usage.completion_tokens) > 1 and delta.index in self._first:
            metrics.per_token.observe((now - self._first[delta.index]) / (tokens - 1))

    def close(self, *, complete: bool) -> None:
        """End the measurement; `complete` says whether all choices have ended."""
        for index, tokens in self._prompts.items():  # choices that were cut short
            self._metrics.prompt_computed.inc(tokens if index in self._first else 0)
        if complete:
            self._metrics.latency.observe(time.monotonic() - self._started)
