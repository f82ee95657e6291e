"""The dense equivalent held against the truth: a request run sparse, and the same request run dense."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from engine.calibration.steps import Bench, Case, Progress
from engine.config import PAGE_SIZE
from engine.cost import CostModel
from engine.meter import Meter
from engine.protocol import Work


class Comparison(NamedTuple):
    """One request's work, as the meter of a server would have it."""

    context: int
    cached: int  # how much of it was there before, as on a prefix hit
    sparse: Work
    dense: Work

    @property
    def error(self) -> float:
        """Dense seconds as estimated from the sparse run / as measured in the dense run - 1."""
        return self.sparse.dense_seconds / self.dense.device_seconds - 1

    @property
    def decode_error(self) -> float:
        """The same of the tokens after the prompt alone."""
        return self.sparse.dense_decode_seconds / self.dense.decode_seconds - 1


def compare(
    bench: Bench,
    model: CostModel,
    top_k: int,
    *,
    context: int,
    cached: int,
    output: int,
    rounds: int,
    budget: int,
    progress: Progress,
) -> Comparison:
    """Run one request to `context` tokens, the last `output` of them one by one, sparse and dense.

    The two take turns at every step, so that whatever else the machine does slows down both alike, and a
    step's time is the median of `rounds`. Each has pages of its own.
    """
    prompt = context - output
    steps = [(start, min(budget, prompt - start)) for start in range(cached, prompt, budget)]
    steps += [(position, 1) for position in range(prompt, context)]
    meters = {top_k: Meter(model), None: Meter(model)}
    pages = -(-context // PAGE_SIZE)
    for meter in meters.values():
        meter.open("r0", prompt)
    for i, (start, rows) in enumerate(steps):
        progress(f"{context} tokens, sparse and dense", i, len(steps))
        cases = {
            k: Case("", start, rows, 1, k, sampled=start + rows >= prompt, held_out=True) for k in meters
        }
        times: dict[int | None, list[float]] = {k: [] for k in meters}
        for _ in range(rounds):
            for half, (k, case) in enumerate(cases.items()):
                times[k].append(bench.seconds(case, half * pages))
        for k, meter in meters.items():
            meter.charge(bench.plan(cases[k]), statistics.median(times[k]))
    sparse, dense = (meter.close("r0") for meter in meters.values())
    return Comparison(context, cached, sparse, dense)
