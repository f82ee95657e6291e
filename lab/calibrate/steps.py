"""Builds chosen steps and times them with the real runner.

Each case is a batch as the scheduler would plan it: prefill chunks and decodes, sparse and dense, for several
contexts and batch sizes. One case alone does not determine the coefficients; the fit uses all cases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.config import PAGE_SIZE
from engine.memory.planes import PagedCache
from engine.plan.cost import CostModel
from engine.plan.sparsity import is_dense
from engine.plan.types import SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import IndexTopK, SamplingParams
from engine.step.runner import Runner
from lab.tool import StageProgress


@dataclass(frozen=True, slots=True)
class StepCase:
    """A step of `requests` equal requests."""

    kind: str  # dense prefill, sparse decode, ...
    start: int  # tokens of each request that were computed before
    rows: int  # tokens of each request in this step
    requests: int
    index_top_k: IndexTopK
    sampled: bool
    held_out: bool  # not fitted, but used to judge the fit

    @property
    def pages(self) -> int:
        """The number of pages that the requests need together."""
        return self.requests * -(-(self.start + self.rows) // PAGE_SIZE)


class Measured(NamedTuple):
    """A case with its time."""

    case: StepCase
    features: tuple[float, ...]  # see the function `features`
    seconds: float  # the least of all rounds, because disturbances only add time


_CONTEXTS = (
    512,
    1024,
    1536,
    2048,
    3072,
    4096,
    6144,
    8192,
    12288,
    16384,
    24576,
    32768,
    49152,
    65536,
    98304,
    131072,
)


def cases(
    max_context: int, num_pages: int, budget: int, max_running: int, index_top_k: IndexTopK
) -> list[StepCase]:
    """Make the grid of cases, as far as it fits.

    Args:
        max_context: longest context, in tokens.
        num_pages: pages of the cache.
        budget: tokens of the largest step.
        max_running: requests of the largest step.
        index_top_k: sparsity of the sparse cases; None makes no sparse cases.
    """
    made: list[StepCase] = []
    for i, context in enumerate([c for c in _CONTEXTS if c <= max_context] or [max_context]):
        # With one sparsity only, the fit could not separate the cost of selected tokens from that of the context.
        # Each context gets one other sparsity, in turn, so that there are not too many cases.
        kinds: list[IndexTopK] = [
            None,
            *(() if index_top_k is None else _sparsities(index_top_k, i, context)),
        ]
        for sparsity in kinds:
            name, other = "dense" if sparsity is None else "sparse", sparsity not in (None, index_top_k)
            for j, rows in enumerate(sorted({min(64, budget), min(256, budget), budget})):
                if rows > context or (j == 1 and context > 4096) or (j == 2 and context & (context - 1)):
                    continue  # large steps take long: measure fewer of them, but up to the longest context
                if other and j != (i % 2 if context <= 4096 else 0):
                    continue
                start, sampled = context - rows, (i + j) % 2 == 0
                made.append(StepCase(f"{name} prefill", start, rows, 1, sparsity, sampled, (i + j) % 3 == 2))
            for j, requests in enumerate((1, 2, 4, 8)):
                if other and j % 2 != i % 2:
                    continue
                made.append(
                    StepCase(f"{name} decode", context - 1, 1, requests, sparsity, True, (i + j) % 3 == 2)
                )
    return [case for case in made if case.pages <= num_pages and case.requests <= max_running]


def _sparsities(index_top_k: int, i: int, context: int) -> tuple[int, ...]:
    """Return the sparsities to measure at the i-th context: `index_top_k` and one other, without those that are dense."""
    beside = index_top_k * 2 if i % 2 else max(1, index_top_k // 4)
    return tuple(k for k in (index_top_k, beside) if not is_dense(context, k))


def features(model: CostModel, plan: StepPlan) -> tuple[float, ...]:
    """Return a step's units of work, in the order of `Coefficients`. Their dot product is the modelled seconds."""
    sums = [sum(column) for column in zip(*(model.features(r) for r in plan.requests), strict=True)]
    logits = any(request.sample is not None for request in plan.requests)
    return 1.0, float(logits), *map(float, sums)


class Bench:
    """Times steps over a cache whose pages all hold keys and values of random text."""

    def __init__(
        self,
        runner: Runner,
        cache: PagedCache,
        vocab_size: int,
        budget: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._runner, self._cache = runner, cache
        self._budget, self._clock = budget, clock
        self._ids = torch.randint(vocab_size, (1 << 20,), generator=torch.Generator().manual_seed(0)).tolist()

    def fill(self, tokens: int, progress: StageProgress) -> None:
        """Compute `tokens` positions, and copy their pages to all other pages."""
        for start in range(0, tokens, self._budget):
            progress("filling the cache", start, tokens)
            rows = min(self._budget, tokens - start)
            self.seconds(StepCase("fill", start, rows, 1, None, sampled=False, held_out=False))
        self._cache.repeat(-(-tokens // PAGE_SIZE))

    def plan(self, case: StepCase, first_page: int = 0) -> StepPlan:
        """Make the plan of a case, as the scheduler would. Each request has its own pages, from `first_page` on."""
        each = case.pages // case.requests
        pages = range(first_page, first_page + case.pages)
        return StepPlan(
            requests=tuple(
                ScheduledRequest(
                    request_id=f"r{i}",
                    token_ids=tuple(self._ids[case.start + i : case.start + i + case.rows]),
                    start=case.start,
                    page_ids=tuple(pages[i * each : (i + 1) * each]),
                    index_top_k=case.index_top_k,
                    sample=_SAMPLE if case.sampled else None,
                )
                for i in range(case.requests)
            )
        )

    def seconds(self, case: StepCase, first_page: int = 0) -> float:
        """Run a case once; return the seconds that it took."""
        plan = self.plan(case, first_page)
        began = self._clock()
        self._runner.run(plan)
        return self._clock() - began

    def measure(
        self, chosen: Sequence[StepCase], model: CostModel, rounds: int, progress: StageProgress
    ) -> list[Measured]:
        """Run every case in every round, so that a busy phase of the machine does not disturb one case only.

        Every second round runs the cases in reverse order. Short steps, which suffer most from disturbances, run
        `_SHORT_REPEATS` times in each round.
        """
        times: dict[StepCase, list[float]] = {case: [] for case in chosen}
        for turn in range(rounds):
            for i, case in enumerate(chosen if turn % 2 == 0 else chosen[::-1]):
                progress("measuring steps", turn * len(chosen) + i, rounds * len(chosen))
                for _ in range(_SHORT_REPEATS if case.rows == 1 else 1):
                    times[case].append(self.seconds(case))
        return [
            Measured(case, features(model, self.plan(case)), min(seconds)) for case, seconds in times.items()
        ]


_SHORT_REPEATS = 3

_SAMPLE = SampleSpec(
    params=SamplingParams(max_tokens=1, seed=0, temperature=0.0), output_index=0, prompt_len=1, history=()
)
