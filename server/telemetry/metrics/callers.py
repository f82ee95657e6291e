"""What each key's requests are: how they ended, their tokens, and what they were charged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from server.money.accounting import Settlement
from server.money.pricing import NANO

MAX_LABELS = 200
"""So many keys have their own label; all later ones are `other`. Each costs a monitoring system a few series."""


class CallerCollector(Collector):
    """Counts by the names of keys. Only requests with a valid key are counted, so no stranger can make a label."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._nanos: Counter[str] = Counter()

    def ended(self, name: str, outcome: str) -> None:
        """Count a request of a key."""
        self._requests[self._label(name), outcome] += 1

    def closed(self, entry: Settlement) -> None:
        """Add a request whose account was closed."""
        if not entry.verified:
            return
        label = self._label(entry.key)
        self._tokens[label, "prompt"] += entry.prompt_tokens
        self._tokens[label, "completion"] += entry.completion_tokens
        self._nanos[label] += entry.bill.amount

    def _label(self, name: str) -> str:
        if name not in self._names and len(self._names) < MAX_LABELS:
            self._names.add(name)
        return name if name in self._names else "other"

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of a scrape."""
        requests = CounterMetricFamily(
            "dsa_key_requests", "Requests of each key, by how they ended.", labels=["key", "outcome"]
        )
        for labels, count in sorted(self._requests.items()):
            requests.add_metric(list(labels), count)
        if self._requests:  # a server without keys has none of these
            yield requests
        tokens = CounterMetricFamily(
            "dsa_key_tokens", "Tokens that each key was charged for.", labels=["key", "kind"]
        )
        for labels, count in sorted(self._tokens.items()):
            tokens.add_metric(list(labels), count)
        if self._tokens:
            yield tokens
        cost = CounterMetricFamily("dsa_key_cost_usd", "What each key was charged.", labels=["key"])
        for label, nanos in sorted(self._nanos.items()):
            cost.add_metric([label], nanos / NANO)
        if self._nanos:
            yield cost
