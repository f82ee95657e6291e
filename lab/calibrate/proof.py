"""The dense equivalent held against the truth: a request run sparse, and the same request run dense."""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.config import PAGE_SIZE
from engine.plan.cost import CostModel
from engine.plan.meter import Meter
from engine.protocol import Work
from lab.calibrate.steps import Bench, Case, Progress

_SETTLED = 0.02
_MORE_ROUNDS = 4


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
    index_top_k: int,
    *,
    context: int,
    cached: int,
    output: int,
    rounds: int,
    budget: int,
    progress: Progress,
) -> Comparison:
    """Run one request to `context` tokens, the last `output` of them one by one, sparse and dense.

    The two take turns at every step, so that whatever else the machine does slows down both alike, and a step's time
    is the least of all rounds. There are `rounds` of them and, where the error still moves from one to the next by
    more than `_SETTLED`, up to `_MORE_ROUNDS` more: a machine in use needs longer. Each has pages of its own.
    """
    prompt = context - output
    steps = [(start, min(budget, prompt - start)) for start in range(cached, prompt, budget)]
    steps += [(position, 1) for position in range(prompt, context)]
    pages = -(-context // PAGE_SIZE)
    cases = [
        {
            k: Case("", start, rows, 1, k, sampled=start + rows >= prompt, held_out=True)
            for k in (index_top_k, None)
        }
        for start, rows in steps
    ]
    times: dict[Case, float] = {}
    found: list[Comparison] = []
    while len(found) < rounds + _MORE_ROUNDS:
        for i, pair in enumerate(cases):
            progress(f"{context} tokens, sparse and dense", i, len(cases))
            for half, case in enumerate(pair.values()):
                times[case] = min(bench.seconds(case, half * pages), times.get(case, math.inf))
        work = {}
        for k in (index_top_k, None):
            meter = Meter(model)
            meter.open("r0", prompt)
            for pair in cases:
                meter.charge(bench.plan(pair[k]), times[pair[k]])
            work[k] = meter.close("r0")
        found.append(Comparison(context, cached, work[index_top_k], work[None]))
        if len(found) >= rounds and (len(found) < 2 or abs(found[-1].error - found[-2].error) < _SETTLED):
            break
    return found[-1]
