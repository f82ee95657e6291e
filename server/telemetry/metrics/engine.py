"""The engine's gauges and counters, read from its status whenever metrics are scraped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.client import EngineState, EngineStatus
from engine.protocol import BATCH_BOUNDS, SELECTION_FLAWS, EngineStats, add_counters

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
"""(field of the engine's stats, name of the metric, its help text)."""


class EngineCollector(Collector):
    """Reads the engine's status."""

    def __init__(self, model_name: str, status: Callable[[], EngineStatus]) -> None:
        self._model_name = model_name
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of a scrape."""
        status = self._status()
        totals = add_counters(status.ended, status.stats)
        up = status.state is EngineState.READY
        stats = status.stats if up else EngineStats()  # an engine that is down holds nothing
        yield GaugeMetricFamily("dsa_requests_running", "Requests in the engine's steps.", stats.running)
        yield GaugeMetricFamily("dsa_requests_waiting", "Requests waiting in the engine.", stats.waiting)
        yield GaugeMetricFamily("dsa_engine_up", "1 when the engine takes requests.", float(up))
        yield CounterMetricFamily(
            "dsa_engine_restarts", "Engine processes started after one died.", status.restarts
        )
        yield CounterMetricFamily(
            "dsa_engine_hangs", "Engine processes killed because they made no progress.", status.hangs
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
        yield _invalid_selections(totals.invalid_selections_total)
        yield from _drafts(totals.draft_lengths_total)
        yield _batch_sizes(totals)
        yield self._info(status)
        yield from self._aliases(stats, status, stats.pages_used / total if total else 0.0)

    def _aliases(self, stats: EngineStats, status: EngineStatus, used: float) -> Iterator[Metric]:
        """Yield copies under the names that the Gateway API inference extension reads by default."""
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


def _invalid_selections(counts: Sequence[int]) -> Metric:
    family = CounterMetricFamily(
        "dsa_invalid_selections",
        "Requests that ended because a layer selected an invalid set of tokens.",
        labels=["kind"],
    )
    for kind, count in zip(SELECTION_FLAWS, counts or (0,) * len(SELECTION_FLAWS), strict=True):
        family.add_metric([kind], count)
    return family


def _drafts(lengths: Sequence[int]) -> Iterator[Metric]:
    """Yield the metrics of speculation. `lengths[n]` counts the drafts of which n tokens were right."""
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
    """The histogram of requests in a step, from the engine's own counts."""
    counts = totals.batch_size_counts_total or (0,) * (len(BATCH_BOUNDS) + 1)
    bounds = [*(f"{bound}.0" for bound in BATCH_BOUNDS), "+Inf"]
    buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
    family = HistogramMetricFamily("dsa_engine_batch_requests", "Requests in a step.")
    family.add_metric([], buckets, totals.batch_requests_total)
    return family
