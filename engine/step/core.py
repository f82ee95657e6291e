"""The engine's loop body: schedule a step, run it, apply its result. `engine.step.process` is the loop around it."""

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
"""After so many failed steps in a row the device is probably broken, and the process should be replaced."""


PROGRESS_SECONDS = 0.2
"""The time between two reports of what running requests have used. If the engine dies, at most so much is lost."""


class StepRunner(Protocol):
    """Computes a plan: `engine.step.runner.Runner`, or a substitute in tests of the loop."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute the plan, and return the drawn tokens."""
        ...


class EngineCore:
    """The synchronous loop body, around a scheduler and a runner."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        meter: Meter,
        *,
        sparse: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sparse`: the model has an indexer. Without one every request runs dense, whatever it asks for."""
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
        """Whether a request is waiting or running."""
        return self._scheduler.has_work

    @property
    def broken(self) -> bool:
        """Whether `MAX_FAILED_STEPS` steps have failed in a row."""
        return self._failed_steps >= MAX_FAILED_STEPS

    def stats(self) -> EngineStats:
        """The gauges and counters of this moment."""
        return self._meter.add_to(self._scheduled())

    def _scheduled(self) -> EngineStats:
        return msgspec.structs.replace(
            self._scheduler.stats(),
            nonfinite_logits_total=self._nonfinite,
            failed_steps_total=self._failed_steps_total,
        )

    def tell(self, deltas: tuple[Delta, ...], *, gauges: bool = True) -> StepOutput:
        """Make the message to the server about a step, or about events between two steps.

        The engine's counters and the usage of running requests are reported together: a few times a second, and
        whenever a delta has usage. So the two agree at every report. If the engine dies, its work since the last
        report is in neither of them. Between two reports a message has stats only if `gauges` asks for them: most
        steps change nothing that anybody would miss for so short a time.
        """
        now = self._clock()
        progress: tuple[tuple[str, Work], ...] = ()
        due = now - self._told_at >= PROGRESS_SECONDS or any(delta.usage is not None for delta in deltas)
        if not due and not gauges:
            return StepOutput(deltas=deltas)
        if due:
            self._told_at, self._told = now, self._meter.counters()
            progress = self._meter.progress()
        stats = msgspec.structs.replace(self._scheduled(), **self._told)
        return StepOutput(deltas=deltas, stats=stats, progress=progress)

    def submit(self, request: Submit) -> tuple[Delta, ...]:
        """Queue a request. If it can never run, return the delta that ends it, with the reason."""
        if not self._sparse and request.index_top_k is not None:
            request = msgspec.structs.replace(request, index_top_k=None)
        try:
            self._scheduler.add(request, self._clock())
        except ValueError as error:
            return (_refusal(request, str(error)),)
        self._meter.open(request.request_id, len(request.prompt_token_ids))
        return ()

    def abort(self, request_id: str) -> tuple[Delta, ...]:
        """End a request between steps, and return its last delta. Nothing happens if it has already ended."""
        delta = self._scheduler.abort(request_id, self._clock())
        return () if delta is None else self._metered((delta,))

    def abort_all(self) -> tuple[Delta, ...]:
        """End all requests, and return their last deltas."""
        return self._metered(self._scheduler.abort_all(self._clock()))

    def step(self) -> StepOutput | None:
        """Run one step and return its output; None if there is nothing to do."""
        plan = self._scheduler.schedule(self._clock())
        if plan is None:
            return None
        began = self._clock()
        result = self._run(plan)
        now = self._clock()
        self._meter.charge(plan, now - began)
        self._nonfinite += sum(sampled.nonfinite for sampled in result.sampled)
        deltas = self._metered(self._scheduler.apply(plan, result, now))
        return self.tell(deltas, gauges=False)

    def _run(self, plan: StepPlan) -> StepResult:
        """Run the plan. An error ends the requests in the plan, with the reason, and no other requests.

        Raises:
            RankError: the ranks may no longer be at the same step, so no more steps are possible.
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
        """Write the meter's counts into each usage. A last delta also ends the request's count."""
        return tuple(
            delta if delta.usage is None else self._with_work(delta, delta.usage) for delta in deltas
        )

    def _with_work(self, delta: Delta, usage: RequestUsage) -> Delta:
        name = delta.request_id
        work = self._meter.work(name) if delta.finish_reason is None else self._meter.close(name)
        return msgspec.structs.replace(delta, usage=msgspec.structs.replace(usage, work=work))


def _refusal(request: Submit, reason: str) -> Delta:
    """The only delta of a request that was not queued."""
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
