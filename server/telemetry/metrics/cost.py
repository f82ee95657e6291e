"""What requests cost, by class of token, by attention and by the length of their context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.money.accounting import Settlement
from server.money.pricing import NANO, Class, PriceBook, machine_nanos

CONTEXT_BOUNDS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
"""Upper bounds of the labels `context`, in tokens of prompt and output."""


def _context_bucket(tokens: int) -> str:
    return next((f"le_{bound}" for bound in CONTEXT_BOUNDS if tokens <= bound), f"gt_{CONTEXT_BOUNDS[-1]}")


class CostCollector(Collector):
    """Sums money in whole nano-dollars, so that a scrape is exact up to nine million dollars."""

    def __init__(self, prices: PriceBook | None) -> None:
        self._prices = prices
        self._classes: dict[str, int] = dict.fromkeys(get_args(Class), 0)
        self._amounts = {"actual": 0, "dense_equivalent": 0}
        # Every series exists from the start: a rate would miss the first value of a new series.
        contexts = [_context_bucket(bound) for bound in (*CONTEXT_BOUNDS, CONTEXT_BOUNDS[-1] + 1)]
        self._tokens = Counter(dict.fromkeys(product(contexts, ("prefill", "decode")), 0))
        self._context = Counter(
            {(*pair, attention): 0 for pair, attention in product(self._tokens, self._amounts)}
            if prices is not None
            else {}
        )

    def closed(self, entry: Settlement) -> None:
        """Add a request whose account was closed."""
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
        """Yield the metrics of a scrape."""
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
