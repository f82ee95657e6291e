"""The engine's loop body: schedule a step, run it, apply its result. `engine.step.process` is the loop around it.

If the runner takes plans ahead, the next step is scheduled and launched before the result of this one is awaited. So the
device computes while the host applies results, tells the server, and plans. If a plan draws tokens of an answer that has a
grammar, only the draw waits for the tokens before it: they decide what may follow.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from engine.errors import RankError
from engine.plan.meter import Meter
from engine.plan.scheduler import MAX_IN_FLIGHT, Scheduler
from engine.plan.types import Sampled, StepPlan, StepResult
from engine.protocol import (
    SELECTION_FLAWS,
    Delta,
    EngineStats,
    FinishReason,
    RequestUsage,
    StepOutput,
    Submit,
    Work,
)
from engine.step.grammars import Compiled, Grammars
from engine.step.masking import Masking, TokenMasks

_log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""After so many failed steps in a row the device is probably broken, and the process should be replaced."""


GAUGE_SECONDS = 0.005
"""What is known of the engine is so old at most: the last step, on a CPU; a few steps, on a GPU, which tells them cheaper so."""

PROGRESS_SECONDS = 0.2
"""The time between two reports of what running requests have used. If the engine dies, at most so much is lost."""


class Flight(Protocol):
    """A plan that was launched."""

    def draw(self, masks: TokenMasks | None) -> None:
        """Draw the tokens of a plan that was launched with `hold`."""
        ...

    def result(self) -> StepResult:
        """Wait for the drawn tokens, and return them."""
        ...


class StepRunner(Protocol):
    """Computes plans, in the order in which they are launched: `engine.step.runner.Runner` and others."""

    @property
    def ahead(self) -> bool:
        """Whether a plan may be launched while the one before it is in flight, with `PENDING` in place of its tokens."""
        ...

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None, *, hold: bool = False) -> Flight:
        """Begin to compute the plan.

        Args:
            plan: what to compute
            masks: which tokens may be drawn; None: any
            hold: draw nothing before the flight's `draw`; only if plans are taken ahead
        """
        ...


@dataclass
class _Launched:
    plan: StepPlan
    flight: Flight
    began: float  # on the core's clock
    held: bool  # its draw waits for masks
    failed: Mapping[str, str]  # requests that have no mask, and why


class EngineCore:
    """The synchronous loop body, around a scheduler and a runner."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        meter: Meter,
        *,
        sparse: bool,
        grammars: Grammars | None = None,
        late_masks: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing runs.

        Args:
            scheduler: of the requests
            runner: computes plans
            meter: counts what requests use
            sparse: the model has an indexer; without one every request runs dense, whatever it asks for
            grammars: compiles those of requests; None: no request can have one
            late_masks: the runner draws with `engine.step.sampler.sample`, which may ask for masks late
            clock: in seconds
        """
        self._scheduler = scheduler
        self._runner = runner
        self._meter = meter
        self._sparse = sparse
        self._grammars = grammars
        self._masking = Masking()
        self._late_masks = late_masks
        self._compiling: dict[str, Submit] = {}  # requests whose grammar a thread compiles
        self._apart: Callable[[Compiled], None] | None = None
        self._clock = clock
        self._failed_steps = 0
        self._failed_steps_total = 0
        self._flights: deque[_Launched] = deque()
        self._done = -math.inf  # when the last step was done, on the clock
        self._nonfinite = 0
        self._invalid = [0] * len(SELECTION_FLAWS)
        self._told_at = self._gauged_at = 0.0
        self._told = meter.counters()

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running, or a step is in flight."""
        return self._scheduler.has_work or bool(self._flights)

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
            invalid_selections_total=tuple(self._invalid),
            failed_steps_total=self._failed_steps_total,
        )

    def tell(self, deltas: tuple[Delta, ...], *, gauges: bool = True) -> StepOutput:
        """Make the message to the server about a step, or about events between two steps.

        The engine's counters and the usage of running requests are reported together: a few times a second, and
        whenever a delta has usage. So the two agree at every report. If the engine dies, its work since the last
        report is in neither of them. Between two reports a message has stats if `gauges` asks for them, or if those
        told before are older than `GAUGE_SECONDS`.
        """
        now = self._clock()
        progress: tuple[tuple[str, Work], ...] = ()
        due = now - self._told_at >= PROGRESS_SECONDS or any(delta.usage is not None for delta in deltas)
        if not due and not gauges and now - self._gauged_at < GAUGE_SECONDS:
            return StepOutput(deltas=deltas)
        self._gauged_at = now
        if due:
            self._told_at, self._told = now, self._meter.counters()
            progress = self._meter.progress()
        stats = msgspec.structs.replace(self._scheduled(), **self._told)
        return StepOutput(deltas=deltas, stats=stats, progress=progress)

    def compile_apart(self, then: Callable[[Compiled], None]) -> None:
        """From now on compile new grammars on a thread, which calls `then`; give what it gets to `compiled`."""
        self._apart = then

    def submit(self, request: Submit) -> tuple[Delta, ...]:
        """Queue a request. If it can never run, return the delta that ends it, with the reason."""
        if not self._sparse and request.index_top_k is not None:
            request = msgspec.structs.replace(request, index_top_k=None)
        if request.grammar is None:
            return self._queue(request)
        if self._grammars is None:
            return (_ended(request, "error", "this engine has no vocabulary, which a grammar needs"),)
        if self._apart is None:
            return self._queue_compiled(self._grammars.compile(request))
        matcher = self._grammars.kept(request.grammar.text)
        if matcher is not None:
            return self._queue_compiled(Compiled(request, matcher))
        self._compiling[request.request_id] = request
        self._grammars.compile_apart(request, self._apart)
        return ()

    def compiled(self, made: Compiled) -> tuple[Delta, ...]:
        """Queue a request whose grammar a thread has compiled, unless it was aborted meanwhile."""
        if self._compiling.pop(made.request.request_id, None) is None:
            return ()
        return self._queue_compiled(made)

    def _queue_compiled(self, made: Compiled) -> tuple[Delta, ...]:
        request, matcher = made.request, made.matcher
        if matcher is None or request.grammar is None:
            return (_ended(request, "error", made.error),)
        deltas = self._queue(request)
        if not deltas:
            self._masking.open(request.request_id, request.grammar, matcher)
        return deltas

    def _queue(self, request: Submit) -> tuple[Delta, ...]:
        try:
            self._scheduler.add(request, self._clock())
        except ValueError as error:
            return (_ended(request, "error", str(error)),)
        self._meter.open(request.request_id, len(request.prompt_token_ids))
        return ()

    def abort(self, request_id: str) -> tuple[Delta, ...]:
        """End a request between steps, and return its last delta. Nothing happens if it has already ended."""
        if (request := self._compiling.pop(request_id, None)) is not None:
            return (_ended(request, "abort"),)
        delta = self._scheduler.abort(request_id, self._clock())
        return () if delta is None else self._over((delta,))

    def abort_all(self) -> tuple[Delta, ...]:
        """End all requests, and return their last deltas."""
        compiling = tuple(_ended(request, "abort") for request in self._compiling.values())
        self._compiling.clear()
        return compiling + self._over(self._scheduler.abort_all(self._clock()))

    def step(self) -> StepOutput | None:
        """Launch what can be launched, wait for the oldest step in flight, and return its output.

        None if there is nothing to do.
        """
        for _ in range(MAX_IN_FLIGHT if self._runner.ahead else 1):
            if len(self._flights) == MAX_IN_FLIGHT or (self._flights and not self._runner.ahead):
                break
            plan = self._scheduler.schedule(self._clock())
            if plan is None:
                break
            self._flights.append(self._launch(plan))
        if not self._flights:
            return None
        launched = self._flights.popleft()
        plan = launched.plan
        result = self._result(launched)
        now = self._clock()
        # Steps that overlap share no time: the device computes one after another.
        self._meter.charge(plan, now - max(launched.began, self._done))
        self._done = now
        self._note(plan, result)
        deltas = self._over(self._scheduler.apply(plan, result, now))
        if self._flights and self._flights[0].held:
            self._draw(self._flights[0])
        return self.tell(deltas, gauges=False)

    def _note(self, plan: StepPlan, result: StepResult) -> None:
        """Count and log what the step's sentinels saw: logits that are not finite, and invalid selections."""
        for request, sampled in zip(plan.requests, result.sampled, strict=True):
            if not sampled.nonfinite and not sampled.flaws:
                continue
            self._nonfinite += sampled.nonfinite
            for i in range(len(SELECTION_FLAWS)):
                self._invalid[i] += sampled.flaws >> i & 1
            _log.error(
                "request %s ends at step %d, with positions %d to %d: %s",
                request.request_id,
                self._scheduler.stats().steps_total + 1,
                request.start,
                request.start + len(request.token_ids) - 1,
                sampled.error,
            )

    def _launch(self, plan: StepPlan) -> _Launched:
        """Launch the plan. An error becomes the result of its requests.

        If its draw needs masks, and tokens before it are not known, it waits for `_draw`.

        Raises:
            RankError: the ranks may no longer be at the same step, so no more steps are possible.
        """
        began = self._clock()
        masked = bool(self._masking) and any(self._masking.of(plan))
        hold = masked and bool(self._flights)
        failed: Mapping[str, str] = {}
        try:
            if hold:
                flight = self._runner.launch(plan, hold=True)
            elif masked:
                masks, failed = self._masking.masks(plan, late=self._late_masks)
                flight = self._runner.launch(plan, masks)
            else:
                flight = self._runner.launch(plan)
        except RankError:
            raise
        except Exception as error:
            flight, hold = _Failed(error), False
        return _Launched(plan, flight, began, hold, failed)

    def _draw(self, launched: _Launched) -> None:
        """Draw the tokens of a plan that waits, now that the tokens before it are known."""
        launched.held = False
        masks = None
        try:
            masks, launched.failed = self._masking.masks(launched.plan)
        except Exception as error:
            _log.error("masks failed", exc_info=error)
            reason = f"the engine failed to enforce the grammar: {type(error).__name__}: {error}"
            launched.failed = {one.request_id: reason for one in self._masking.of(launched.plan)}
        try:
            launched.flight.draw(masks)
        except Exception as error:
            launched.flight = _Failed(error)

    def _result(self, launched: _Launched) -> StepResult:
        """The result of a plan. An error ends the requests in the plan, with the reason, and no other requests."""
        plan = launched.plan
        try:
            result = launched.flight.result()
        except Exception as error:
            self._failed_steps += 1
            self._failed_steps_total += 1
            _log.error("a step failed", exc_info=error)
            reason = f"the engine failed to compute this request's step: {type(error).__name__}: {error}"
            return StepResult(sampled=tuple(Sampled(error=reason) for _ in plan.requests))
        self._failed_steps = 0
        if failed := launched.failed:
            sampled = (
                Sampled(error=failed[one.request_id]) if one.request_id in failed else drawn
                for one, drawn in zip(plan.requests, result.sampled, strict=True)
            )
            result = StepResult(sampled=tuple(sampled))
        return result

    def _over(self, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
        """What is left to do with deltas of the scheduler: grammars go on by their tokens, and the meter's counts are added."""
        if self._masking:
            self._masking.accept(deltas)
        return self._metered(deltas)

    def _metered(self, deltas: tuple[Delta, ...]) -> tuple[Delta, ...]:
        """Write the meter's counts into each usage. A last delta also ends the request's count."""
        return tuple(
            delta if delta.usage is None else self._with_work(delta, delta.usage) for delta in deltas
        )

    def _with_work(self, delta: Delta, usage: RequestUsage) -> Delta:
        name = delta.request_id
        work = self._meter.work(name) if delta.finish_reason is None else self._meter.close(name)
        return msgspec.structs.replace(delta, usage=msgspec.structs.replace(usage, work=work))


class _Failed:
    """A plan that could not be launched."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def draw(self, masks: TokenMasks | None) -> None:
        raise AssertionError("what was not launched cannot wait")

    def result(self) -> StepResult:
        raise self._error


def _ended(request: Submit, reason: FinishReason, error: str | None = None) -> Delta:
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
    return Delta(request_id=request.request_id, finish_reason=reason, error=error, usage=usage)
