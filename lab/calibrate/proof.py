"""Checks the estimated dense cost: runs a request sparse, and the same request dense."""

from __future__ import annotations

import math
from typing import NamedTuple

from engine.config import PAGE_SIZE
from engine.plan.cost import CostModel
from engine.plan.meter import Meter
from engine.protocol import Work
from lab.calibrate.steps import Bench, StepCase
from lab.tool import StageProgress

_SETTLED = 0.02
_MORE_ROUNDS = 4


class Comparison(NamedTuple):
    """One request's work, sparse and dense, as a server's meter counts it."""

    context: int
    cached: int  # tokens of it that were in the cache before, as after a prefix hit
    sparse: Work
    dense: Work

    @property
    def error(self) -> float:
        """(dense seconds estimated from the sparse run / dense seconds measured in the dense run) - 1."""
        return self.sparse.dense_seconds / self.dense.device_seconds - 1

    @property
    def decode_error(self) -> float:
        """The same error for only the tokens after the prompt."""
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
    progress: StageProgress,
) -> Comparison:
    """Run one request to `context` tokens, sparse and dense; the last `output` tokens are computed one by one.

    The two take turns at every step, so that other work on the machine slows down both. A step's time is the least
    of all rounds. There are `rounds` rounds. While the error changes by more than `_SETTLED` from one round to the
    next, there are up to `_MORE_ROUNDS` more, because a busy machine needs more. Sparse and dense have their own pages.
    """
    prompt = context - output
    steps = [(start, min(budget, prompt - start)) for start in range(cached, prompt, budget)]
    steps += [(position, 1) for position in range(prompt, context)]
    pages = -(-context // PAGE_SIZE)
    cases = [
        {
            k: StepCase("", start, rows, 1, k, sampled=start + rows >= prompt, held_out=True)
            for k in (index_top_k, None)
        }
        for start, rows in steps
    ]
    times: dict[StepCase, float] = {}
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
