"""The engine's step: schedule, run, apply."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import msgspec

from engine.errors import RankError
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.types import Sampled, StepPlan, StepResult
from engine.protocol import Delta, EngineStats, RequestUsage, StepOutput, Submit, Work

_log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the device is thought broken and the process should be replaced."""


PROGRESS_SECONDS = 0.2
"""How often the server hears what live requests have used: what an engine's death can lose of it."""


class StepRunner(Protocol):
    """What computes a plan: `engine.step.runner.Runner`, or a stand-in in tests of the loop."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan."""
        ...


class EngineCore:
    """One synchronous loop body around a scheduler and a runner."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        meter: Meter,
        *,
        sparse: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sparse`: the model has an indexer; without one every request runs dense, whatever it asks."""
        self._scheduler = scheduler
        self._runner = runner
        self._meter = meter
        self._sparse = sparse
        self._clock = clock
        self._failed_steps = 0
        self._failed_steps_total = 0
        self._nonfinite = 0
        self._told_at = 0.0
        self._told = meter.counters()

    @property
    def has_work(self) -> bool:
        """Some request is waiting or running."""
        return self._scheduler.has_work

    @property
    def broken(self) -> bool:
        """Too many steps failed in a row."""
        return self._failed_steps >= MAX_FAILED_STEPS

    def stats(self) -> EngineStats:
        """Gauges and counters of now."""
        return self._meter.add_to(self._scheduled())

    def _scheduled(self) -> EngineStats:
        return msgspec.structs.replace(
            self._scheduler.stats(),
            nonfinite_logits_total=self._nonfinite,
            failed_steps_total=self._failed_steps_total,
        )

    def tell(self, deltas: tuple[Delta, ...]) -> StepOutput:
        """What the server hears of a step, or of what happened between two.

        The engine's account and those of its requests are told together: a few times a second, and whenever
        a delta brings usage. So they agree whenever the engine dies, and what it did since then is in neither.
        """
        now = self._clock()
        progress: tuple[tuple[str, Work], ...] = ()
        if now - self._told_at >= PROGRESS_SECONDS or any(delta.usage is not None for delta in deltas):
            self._told_at, self._told = now, self._meter.counters()
            progress = self._meter.progress()
        stats = msgspec.structs.replace(self._scheduled(), **self._told)
        return StepOutput(deltas=deltas, stats=stats, progress=progress)

    def submit(self, request: Submit) -> tuple[Delta, ...]:
        """Queue a request; one that can never run ends at once, with the reason."""
        if not self._sparse and request.index_top_k is not None:
            request = msgspec.structs.replace(request, index_top_k=None)
        try:
            self._scheduler.add(request, self._clock())
        except ValueError as error:
            return (_refusal(request, str(error)),)
        self._meter.open(request.request_id, len(request.prompt_token_ids))
        return ()

    def abort(self, request_id: str) -> tuple[Delta, ...]:
        """End a request between steps; nothing if it is not here any more."""
        delta = self._scheduler.abort(request_id, self._clock())
        return () if delta is None else self._metered((delta,))

    def abort_all(self) -> tuple[Delta, ...]:
        """End everything."""
        return self._metered(self._scheduler.abort_all(self._clock()))

    def step(self) -> StepOutput | None:
        """One step, or None when there is nothing to do."""
        plan = self._scheduler.schedule(self._clock())
        if plan is None:
            return None
        began = self._clock()
        result = self._run(plan)
        now = self._clock()
        self._meter.charge(plan, now - began)
        self._nonfinite += sum(sampled.nonfinite for sampled in result.sampled)
        deltas = self._metered(self._scheduler.apply(plan, result, now))
        return self.tell(deltas)

    def _run(self, plan: StepPlan) -> StepResult:
        """Run the plan; a fault ends the requests that were in it, with the reason, and no others.

        Raises:
            RankError: the ranks no longer compute the same, so there is no next step.
        """
        try:
            result = self._runner.run(plan)
        except RankError:
            raise
        except Exception as error:
            self._failed_steps += 1
            self._failed_steps_total += 1
            _log.exception("a step failed")
            reason = f"the engine failed to compute this request's step: {type(error).__name__}: {error}"
            return StepResult(sampled=tuple(Sampled(error=reason) for _ in plan.requests))
        self._failed_steps = 0
        return result

    def _metered(self, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
        """Write into each usage what the meter counted; a terminal one ends the request's account."""
        return tuple(
            delta if delta.usage is None else self._with_work(delta, delta.usage) for delta in deltas
        )

    def _with_work(self, delta: Delta, usage: RequestUsage) -> Delta:
        name = delta.request_id
        work = self._meter.work(name) if delta.finish_reason is None else self._meter.close(name)
        return msgspec.structs.replace(delta, usage=msgspec.structs.replace(usage, work=work))


def _refusal(request: Submit, reason: str) -> Delta:
    """The one delta of a request that was never queued."""
    usage = RequestUsage(
        prompt_tokens=len(request.prompt_token_ids),
        cached_tokens=0,
        completion_tokens=0,
        preemptions=0,
        index_top_k=request.index_top_k,
        queue_seconds=0.0,
        prefill_seconds=0.0,
        decode_seconds=0.0,
    )
    return Delta(request_id=request.request_id, finish_reason="error", error=reason, usage=usage)
