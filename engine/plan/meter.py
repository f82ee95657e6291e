"""Divides each step's measured time and counted work over its requests.

The shares of a step sum to its measured time, so the seconds of all requests sum to the engine's busy seconds.
`engine.plan.cost` models how much time work takes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine.plan.cost import CostModel, Counts
from engine.plan.types import StepPlan
from engine.protocol import BATCH_BOUNDS, EngineStats, Work


class _Tally:
    """The sums of one request. Mutable, because every step adds to it."""

    __slots__ = (
        "attended", "decode", "dense_decode", "dense_prefill", "index_pairs", "index_rows_read",
        "kv_rows_read", "logits", "num_prompt", "prefill", "rows", "sparse_rows",
    )  # fmt: skip

    def __init__(self, num_prompt: int) -> None:
        self.num_prompt = num_prompt
        self.rows = self.attended = self.index_pairs = self.kv_rows_read = 0
        self.index_rows_read = self.logits = self.sparse_rows = 0
        self.prefill = self.decode = self.dense_prefill = self.dense_decode = 0.0

    def add(self, counts: Counts) -> None:
        self.rows += counts.rows
        self.attended += counts.attended
        self.index_pairs += counts.index_pairs
        self.kv_rows_read += counts.kv_rows_read
        self.index_rows_read += counts.index_rows_read
        self.logits += counts.logits
        self.sparse_rows += counts.sparse_rows

    def counts(self) -> Counts:
        return Counts(
            self.rows, self.attended, self.index_pairs, self.kv_rows_read, self.index_rows_read,
            self.logits, self.sparse_rows,
        )  # fmt: skip


class Meter:
    """Keeps an account for every live request and one for the engine."""

    def __init__(self, model: CostModel) -> None:
        self._model = model
        self._live: dict[str, _Tally] = {}
        self._closed = _Tally(0)  # the sums of requests that have ended
        self._busy = 0.0
        self._index = 0.0
        self._dense = 0.0
        self._batch_counts = [0] * (len(BATCH_BOUNDS) + 1)
        self._batch_sum = 0

    def open(self, request_id: str, num_prompt: int) -> None:
        """Begin the account of a request whose prompt has `num_prompt` tokens."""
        self._live[request_id] = _Tally(num_prompt)

    def charge(self, plan: StepPlan, seconds: float) -> None:
        """Divide a step that took `seconds` over the requests in it.

        The time that the requests share (`CostModel.shared`) is divided evenly, the rest by modelled seconds. A request
        that had ended before the step was done pays nothing: the step computed its row ahead, in vain.
        """
        model, requests = self._model, [one for one in plan.requests if one.request_id in self._live]
        count = len(requests)
        if not count:
            return
        shared = model.shared(plan) / count
        work = [
            model.decode(one.start, one.index_top_k)
            if one.is_decode
            else (model.counts(one), model.modelled(one))
            for one in requests
        ]
        scale = seconds / (sum(modelled.actual for _, modelled in work) + shared * count)
        index = dense = 0.0
        for request, (counts, (actual, scoring, instead)) in zip(requests, work, strict=True):
            tally = self._live[request.request_id]
            tally.add(counts)
            own, full = scale * (actual + shared), scale * (instead + shared)
            index += scoring
            dense += full
            if request.start < tally.num_prompt:
                tally.prefill += own
                tally.dense_prefill += full
            else:
                tally.decode += own
                tally.dense_decode += full
        self._busy += seconds
        self._index += scale * index
        self._dense += dense
        self._batch_sum += count
        self._batch_counts[_bucket(count)] += 1

    def progress(self) -> tuple[tuple[str, Work], ...]:
        """What each live request with at least one step has used so far."""
        return tuple((name, self._work(tally)) for name, tally in self._live.items() if tally.rows)

    def work(self, request_id: str) -> Work:
        """What a live request has used so far."""
        return self._work(self._live[request_id])

    def close(self, request_id: str) -> Work:
        """End the account of a request, and return what it used: nothing, if the account was never opened."""
        tally = self._live.pop(request_id, None)
        if tally is None:
            return Work()
        self._closed.add(tally.counts())
        return self._work(tally)

    def counters(self) -> dict[str, Any]:
        """The engine's account, as fields of `EngineStats`."""
        everyone = _Tally(0)
        for tally in (self._closed, *self._live.values()):
            everyone.add(tally.counts())
        counts = everyone.counts()
        return {
            "busy_seconds_total": self._busy,
            "index_seconds_total": self._index,
            "dense_seconds_total": self._dense,
            "selected_tokens_total": counts.attended,
            "index_pairs_total": counts.index_pairs,
            "kv_rows_read_total": counts.kv_rows_read,
            "flops_total": self._model.flops(counts),
            "cache_bytes_total": self._model.cache_bytes(counts),
            "batch_requests_total": self._batch_sum,
            "batch_size_counts_total": tuple(self._batch_counts),
        }

    def add_to(self, stats: EngineStats) -> EngineStats:
        """Return the scheduler's stats with the meter's counters set."""
        return msgspec.structs.replace(stats, **self.counters())

    def _work(self, tally: _Tally) -> Work:
        counts = tally.counts()
        return Work(
            rows=counts.rows,
            selected_tokens=counts.attended,
            index_pairs=counts.index_pairs,
            kv_rows_read=counts.kv_rows_read,
            flops=self._model.flops(counts),
            cache_bytes=self._model.cache_bytes(counts),
            prefill_seconds=tally.prefill,
            decode_seconds=tally.decode,
            dense_prefill_seconds=tally.dense_prefill,
            dense_decode_seconds=tally.dense_decode,
        )


def _bucket(count: int) -> int:
    for index, bound in enumerate(BATCH_BOUNDS):
        if count <= bound:
            return index
    return len(BATCH_BOUNDS)
