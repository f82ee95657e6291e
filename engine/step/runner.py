"""Runs a plan on one rank: builds the batch, runs the model, computes the needed logits and draws the tokens."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import accumulate

import msgspec
import torch
from torch import Tensor

from engine.attention.batch import Batch, build_batch
from engine.errors import EngineError
from engine.memory.planes import PagedCache
from engine.models.family import Model
from engine.plan.tiles import TileCosts
from engine.plan.types import Drawn, Sampled, SampleSpec, StepPlan, StepResult
from engine.step.drafting import LayerDrafter
from engine.step.faults import with_flaws
from engine.step.masking import TokenMasks
from engine.step.sampler import Draw, prompt_logprobs, sample
from engine.step.speculation import row_specs, verify


class Computed:
    """A plan whose result is there."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def draw(self, masks: TokenMasks | None) -> None:
        """Nothing is left to draw."""
        raise EngineError("this plan's tokens are drawn")

    def result(self) -> StepResult:
        """The drawn tokens."""
        return self._result


class AtOnce(ABC):
    """A runner that has computed a plan when `launch` returns, so no plan is made ahead."""

    ahead = False

    @abstractmethod
    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """Compute the plan, and return the drawn tokens, which the masks allow."""

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None, *, hold: bool = False) -> Computed:
        """Compute the plan. Nothing can be held: the tokens before it are known."""
        return Computed(self.run(plan, masks))


class Runner(AtOnce):
    """One model and its cache on one device."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        costs: TileCosts,
        device: torch.device,
        drafter: LayerDrafter | None = None,
        draw: Draw = sample,
    ) -> None:
        self._model = model
        self._cache = cache
        self._costs = costs
        self._device = device
        self._drafter = drafter
        self._draw = draw
        self.model_seconds = 0.0  # time in the model's forward and logits; with CUDA, time to launch them

    @torch.inference_mode()
    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """Compute the plan's rows, write their cache entries, and draw the tokens that the plan asks for."""
        batch, hidden = self.forward(plan)
        ends = list(accumulate(len(request.token_ids) for request in plan.requests))
        specs = [row_specs(request) for request in plan.requests]
        rows = [end - len(own) + i for end, own in zip(ends, specs, strict=True) for i in range(len(own))]
        drawn: Iterator[Drawn] = iter(())
        if rows:
            wanted = hidden if len(rows) == len(hidden) else hidden[rows]  # either ascending
            drawn = iter(
                _draw_each(self._draw, self._logits(wanted), [spec for own in specs for spec in own], masks)
            )
        results: list[Sampled] = []
        for request, end, own in zip(plan.requests, ends, specs, strict=True):
            one = verify(request, [next(drawn) for _ in own])
            if request.prompt_targets:
                first = end - len(request.token_ids)
                targets = hidden[first : first + len(request.prompt_targets)]
                scored = prompt_logprobs(
                    self._logits, targets, request.prompt_targets, request.prompt_alternatives
                )
                one = msgspec.structs.replace(one, prompt_logprobs=scored)
            results.append(one)
        results = list(with_flaws(batch, results))
        if self._drafter is not None:
            results = self._drafter.propose(plan, batch, hidden, results)
        if not rows and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # as tokens would: the step is timed around this call
        return StepResult(sampled=tuple(results))

    def hidden(self, plan: StepPlan) -> Tensor:
        """Hidden states after the last norm, for each row of the plan: [T, hidden]."""
        return self.forward(plan)[1]

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """Compute the plan's rows; return them as tensors, with their hidden states after the last norm [T, hidden]."""
        if plan.wiped_pages:
            self._cache.wipe(plan.wiped_pages)
        batch = build_batch(plan, self._model.batch_device)
        began = time.perf_counter()
        hidden = self._model.forward(batch, self._cache, self._costs)
        self.model_seconds += time.perf_counter() - began
        return batch, hidden

    def _logits(self, rows: Tensor) -> Tensor:
        began = time.perf_counter()
        logits = self._model.logits(rows)
        self.model_seconds += time.perf_counter() - began
        return logits


def _draw_each(draw: Draw, logits: Tensor, specs: list[SampleSpec], masks: TokenMasks | None) -> list[Drawn]:
    """Draw from all rows together. If that fails, draw row by row, so that only the bad request fails."""
    try:
        return draw(logits, specs, masks)
    except (RuntimeError, IndexError, ValueError):
        drawn: list[Drawn] = []
        for row, spec in enumerate(specs):
            own = None if masks is None else masks.part([row])
            try:
                drawn.extend(draw(logits[row : row + 1], [spec], own))
            except (RuntimeError, IndexError, ValueError) as error:
                drawn.append(Drawn(error=f"sampling failed: {error}"))
        return drawn
