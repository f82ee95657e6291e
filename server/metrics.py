"""Measurements for Prometheus; the only user of its client library.

Labels come from closed sets (endpoints, outcomes, kinds), never from what a client sends.
"""

from __future__ import annotations

import time
from collections import Counter as Counter_
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from engine.client import EngineState, EngineStatus
from engine.protocol import BATCH_BOUNDS, EngineStats, add_counters
from server.accounting import Entry
from server.generate import Job, TextDelta
from server.pricing import NANO, Class, PriceBook, machine_nanos

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

CONTEXT_BOUNDS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper bounds of the labels `context`, in tokens of prompt and output."""

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
    ("busy_seconds_total", "dsa_engine_busy_seconds", "Time that the engine's steps took."),
    (
        "index_seconds_total",
        "dsa_engine_index_seconds",
        "Part of the busy time that scoring and selecting took, as modelled.",
    ),
    (
        "dense_seconds_total",
        "dsa_engine_dense_equivalent_seconds",
        "What the steps would have taken with dense attention, as modelled.",
    ),
    ("selected_tokens_total", "dsa_engine_selected_tokens", "(row, token) pairs that attention read."),
    ("index_pairs_total", "dsa_engine_index_pairs", "(row, token) pairs that the indexer scored."),
    ("kv_rows_read_total", "dsa_engine_kv_rows_read", "Tokens whose keys and values were read."),
    ("flops_total", "dsa_engine_flops", "Floating-point operations that the work needed."),
    ("cache_bytes_total", "dsa_engine_cache_bytes", "Bytes of the paged cache read and written."),
    (
        "nonfinite_logits_total",
        "dsa_nonfinite_logits",
        "Requests that ended with logits that are not finite.",
    ),
    (
        "failed_steps_total",
        "dsa_engine_failed_steps",
        "Steps that raised; their requests ended with an error.",
    ),
)
"""Field of the engine's stats, name and help of what is exposed."""


class _EngineCollector(Collector):
    """Reads the engine's status whenever metrics are scraped."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus]) -> None:
        self._model_name = model_name
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        totals = add_counters(status.ended, status.stats)
        up = status.state is EngineState.READY
        stats = status.stats if up else EngineStats()  # what is gone holds nothing
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
        yield _batch_sizes(totals)
        yield self._info(status)
        yield from self._aliases(stats, status, stats.pages_used / total if total else 0.0)

    def _aliases(self, stats: EngineStats, status: EngineStatus, used: float) -> Iterator[Metric]:
        """The names that the Gateway API inference extension reads, if nobody configures it otherwise."""
        labels = {"model_name": self._model_name, "engine": "0"}
        for name, text, number in (
            ("vllm:num_requests_waiting", "Alias of dsa_requests_waiting.", float(stats.waiting)),
            ("vllm:num_requests_running", "Alias of dsa_requests_running.", float(stats.running)),
            ("vllm:kv_cache_usage_perc", "Alias of dsa_kv_cache_usage_ratio, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=list(labels))
            gauge.add_metric(list(labels.values()), number)
            yield gauge
        if (capacity := status.capacity) is not None:
            labels |= {"block_size": str(capacity.page_size), "num_gpu_blocks": str(capacity.num_pages)}
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "The paged cache; always 1.", labels=list(labels)
            )
            info.add_metric(list(labels.values()), 1)
            yield info

    def _info(self, status: EngineStatus) -> Metric:
        labels = {"model": self._model_name}
        if (model := status.model) is not None:
            labels |= {
                "architecture": model.architecture,
                "parameters": str(model.num_parameters),
                "max_model_len": str(model.max_model_len),
                "device": model.device,
                "dtype": model.dtype,
                "cost_model": model.cost_model,
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


def _batch_sizes(totals: EngineStats) -> Metric:
    """Requests a step, as a histogram; the engine counts."""
    counts = totals.batch_size_counts_total or (0,) * (len(BATCH_BOUNDS) + 1)
    bounds = [*(f"{bound}.0" for bound in BATCH_BOUNDS), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
    family = HistogramMetricFamily("dsa_engine_batch_requests", "Requests in a step.")
    family.add_metric([], buckets, totals.batch_requests_total)
    return family


def _context_bucket(tokens: int) -> str:
    return next((f"le_{bound}" for bound in CONTEXT_BOUNDS if tokens <= bound), f"gt_{CONTEXT_BOUNDS[-1]}")


class _CostCollector(Collector):
    """Money, summed in whole nano-dollars, so that a scrape is exact up to nine million dollars."""

    def __init__(self, prices: PriceBook | None) -> None:
        self._prices = prices
        self._classes: dict[str, int] = dict.fromkeys(get_args(Class), 0)
        self._amounts = {"actual": 0, "dense_equivalent": 0}
        # Every series is there from the start: a rate would miss what a new one begins with.
        contexts = [_context_bucket(bound) for bound in (*CONTEXT_BOUNDS, CONTEXT_BOUNDS[-1] + 1)]
        self._tokens = Counter_(dict.fromkeys(product(contexts, ("prefill", "decode")), 0))
        self._context = Counter_(
            {(*pair, attention): 0 for pair, attention in product(self._tokens, self._amounts)}
            if prices is not None
            else {}
        )

    def closed(self, entry: Entry) -> None:
        bill, work = entry.bill, entry.work
        for name, nanos in bill.classes.items():
            self._classes[name] += nanos
        self._amounts["actual"] += bill.metered
        self._amounts["dense_equivalent"] += bill.dense_equivalent
        context = _context_bucket(entry.prompt_tokens + entry.completion_tokens)
        table = self._prices.table if self._prices is not None else None
        for phase, tokens, seconds, dense in (
            ("prefill", entry.prompt_tokens, work.prefill_seconds, work.dense_prefill_seconds),
            ("decode", entry.completion_tokens, work.decode_seconds, work.dense_decode_seconds),
        ):
            self._tokens[context, phase] += tokens
            if table is not None:
                self._context[context, phase, "actual"] += machine_nanos(table, seconds)
                self._context[context, phase, "dense_equivalent"] += machine_nanos(table, dense)

    def collect(self) -> Iterator[Metric]:
        cost = CounterMetricFamily(
            "dsa_cost_usd", "What requests were charged, by class of token.", labels=["class"]
        )
        for name, nanos in self._classes.items():
            cost.add_metric([name], nanos / NANO)
        yield cost
        metered = CounterMetricFamily(
            "dsa_metered_cost_usd",
            "Device time of requests at the machine's price: as it was, and had attention been dense.",
            labels=["attention"],
        )
        for name, nanos in self._amounts.items():
            metered.add_metric([name], nanos / NANO)
        yield metered
        by_context = CounterMetricFamily(
            "dsa_context_cost_usd",
            "Metered cost by the request's context length in tokens, phase and attention.",
            labels=["context", "phase", "attention"],
        )
        for labels, nanos in sorted(self._context.items()):
            by_context.add_metric(list(labels), nanos / NANO)
        yield by_context
        tokens = CounterMetricFamily(
            "dsa_context_tokens",
            "Tokens by the request's context length and phase; with dsa_context_cost_usd, a price a token.",
            labels=["context", "phase"],
        )
        for pair, count in sorted(self._tokens.items()):
            tokens.add_metric(list(pair), count)
        yield tokens
        if (prices := self._prices) is not None:
            yield GaugeMetricFamily(
                "dsa_machine_price_usd_per_hour",
                "What an hour of the device costs.",
                float(prices.table.machine_hour),
            )
            info = GaugeMetricFamily(
                "dsa_price_table_info", "The price table in force; always 1.", labels=["version"]
            )
            info.add_metric([prices.table.version], 1)
            yield info
            yield GaugeMetricFamily(
                "dsa_price_table_current",
                "0 when the file holds an edit that was refused.",
                float(prices.current),
            )
            yield CounterMetricFamily(
                "dsa_price_table_errors", "Edits of the price table that were refused.", prices.errors
            )


REJECTIONS = frozenset(
    "queue_full draining engine_unavailable body_too_large ledger_unavailable rate_limited".split()
)
"""Reasons of rejection that have a label of their own; the rest are `other`."""


class Metrics:
    """One app's measurements."""

    def __init__(
        self, model_name: str, status: Callable[[], EngineStatus], prices: PriceBook | None = None
    ) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(model_name, status))
        self._cost = _CostCollector(prices)
        registry.register(self._cost)
        self._rejections = Counter(
            "dsa_rejections", "Requests refused before they ran, by reason.", ["reason"], registry=registry
        )
        for reason in (*sorted(REJECTIONS), "other"):
            self._rejections.labels(reason)
        self._ledger_errors = Counter(
            "dsa_ledger_errors", "Rows that the usage ledger could not take.", registry=registry
        )
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
        # Looked up once: a label is found under a lock, and every delta counts its tokens.
        self._prompt_computed = self._tokens.labels("prompt_computed")
        self._prompt_cached = self._tokens.labels("prompt_cached")
        self._completion = self._tokens.labels("completion")
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
        self._prefill = self._histogram(
            "dsa_request_prefill_seconds", "From the first step to the first token.", _REQUEST_BUCKETS
        )
        self._decode = self._histogram(
            "dsa_request_decode_seconds", "From the first token to the last.", _REQUEST_BUCKETS
        )
        self._between = self._histogram(
            "dsa_inter_token_latency_seconds",
            "Between two deliveries of tokens of one choice.",
            _TOKEN_BUCKETS,
        )

    def request_ended(self, endpoint: str, outcome: str) -> None:
        """Count a request of any endpoint."""
        self._requests.labels(endpoint, outcome).inc()

    def rejected(self, reason: str | None) -> None:
        """Count a request that was refused before it ran."""
        self._rejections.labels(reason if reason in REJECTIONS else "other").inc()

    def closed(self, entry: Entry) -> None:
        """Count the money of a request whose account was closed."""
        self._cost.closed(entry)

    def ledger_failed(self) -> None:
        """Count a row that was not written."""
        self._ledger_errors.inc()

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
        self._last: dict[int, float] = {}
        self._tokens = dict.fromkeys(self._prompts, 0)

    def delta(self, delta: TextDelta) -> None:
        """Take in what one choice produced."""
        now = time.monotonic()
        metrics = self._metrics
        if delta.token_ids:
            if not self._first:
                metrics._first_token.observe(now - self._started)
            self._first.setdefault(delta.index, now)
            if (last := self._last.get(delta.index)) is not None:
                metrics._between.observe(now - last)
            self._last[delta.index] = now
            self._tokens[delta.index] += len(delta.token_ids)
            metrics._completion.inc(len(delta.token_ids))
        if (usage := delta.usage) is None:
            return
        # A stop token is among the tokens used, but not among those given out.
        rest = max(usage.completion_tokens - self._tokens[delta.index], 0)
        metrics._completion.inc(rest)
        metrics._prompt_cached.inc(usage.cached_tokens)
        metrics._prompt_computed.inc(self._prompts.pop(delta.index) - usage.cached_tokens)
        if usage.queue_seconds is not None:
            metrics._queue.observe(max(usage.queue_seconds, 0.0))
        if usage.prefill_seconds is not None:
            metrics._prefill.observe(max(usage.prefill_seconds, 0.0))
        if delta.index in self._first:
            metrics._decode.observe(now - self._first[delta.index])
        if (tokens := usage.completion_tokens) > 1 and delta.index in self._first:
            metrics._per_token.observe((now - self._first[delta.index]) / (tokens - 1))

    def close(self, *, complete: bool) -> None:
        """End, after all choices or before."""
        for index, tokens in self._prompts.items():  # those that were cut short
            self._metrics._prompt_computed.inc(tokens if index in self._first else 0)
        if complete:
            self._metrics._latency.observe(time.monotonic() - self._started)
