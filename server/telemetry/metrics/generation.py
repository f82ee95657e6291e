"""Measures generating requests from their deltas: tokens, and times between arrival, tokens and end."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from server.generation.generate import Job, TextDelta

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
        self.completion = tokens.labels("completion")
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
        self.between = histogram(
            "dsa_inter_token_latency_seconds",
            "Between two deliveries of tokens of one choice.",
            _TOKEN_BUCKETS,
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

    def delta(self, delta: TextDelta) -> None:
        """Measure a delta of one choice. Call it when the delta arrives."""
        now = time.monotonic()
        metrics = self._metrics
        if delta.token_ids:
            if not self._first:
                metrics.first_token.observe(now - self._started)
            self._first.setdefault(delta.index, now)
            if (last := self._last.get(delta.index)) is not None:
                metrics.between.observe(now - last)
            self._last[delta.index] = now
            self._tokens[delta.index] += len(delta.token_ids)
            metrics.completion.inc(len(delta.token_ids))
        if (usage := delta.usage) is None:
            return
        # The usage counts a stop token, but no delta contains it.
        rest = max(usage.completion_tokens - self._tokens[delta.index], 0)
        metrics.completion.inc(rest)
        metrics.prompt_cached.inc(usage.cached_tokens)
        metrics.prompt_computed.inc(self._prompts.pop(delta.index) - usage.cached_tokens)
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
