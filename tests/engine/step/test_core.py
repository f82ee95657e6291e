"""The loop body with a runner that takes plans ahead: what is launched when, what fails, and who pays."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.tiles import TileCosts
from engine.plan.types import PENDING, Sampled, StepPlan, StepResult
from engine.protocol import Delta, SamplingParams, Submit
from engine.step.core import EngineCore
from engine.step.masking import TokenMasks

SHAPE = ModelShape(
    row_flops=1, sparse_row_flops=1, head_flops=1, pair_flops=1, index_pair_flops=1, weight_bytes=1,
    kv_token_bytes=1, index_token_bytes=1,
)  # fmt: skip
TILES = TileCosts(budget_bytes=1 << 20, index_row_bytes=4, attention_row_bytes=4, token_bytes=4)


class Device:
    """A runner ahead of the host: a step takes a second of its clock from the end of the one before it."""

    ahead = True

    def __init__(self) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.launched = self.fails = 0
        self.waiting = 0
        self.most_waiting = 0

    def clock(self) -> float:
        return self.now

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None, *, hold: bool = False) -> Flight:
        self.launched += 1
        number = self.launched
        self.log.append(f"launch {number}")
        if number == self.fails:
            raise RuntimeError("out of memory")
        self.waiting += 1
        self.most_waiting = max(self.most_waiting, self.waiting)
        return Flight(self, number, plan)


class Flight:
    def __init__(self, device: Device, number: int, plan: StepPlan) -> None:
        self._device, self._number, self._plan = device, number, plan

    def draw(self, masks: TokenMasks | None) -> None:
        self._device.log.append(f"draw {self._number}")

    def result(self) -> StepResult:
        device = self._device
        device.log.append(f"result {self._number}")
        device.waiting -= 1
        device.now += 1.0
        drawn = (Sampled(token_ids=() if one.sample is None else (5,)) for one in self._plan.requests)
        return StepResult(sampled=tuple(drawn))


def core_of(device: Device) -> EngineCore:
    scheduler = Scheduler(64, token_budget=64, max_running=8, max_model_len=512, prefix_caching=False)
    meter = Meter(CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), TILES))
    return EngineCore(scheduler, device, meter, sparse=True, clock=device.clock)


def submit(core: EngineCore, name: str, max_tokens: int, stop: tuple[int, ...] = ()) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, stop_token_ids=stop)
    assert not core.submit(
        Submit(request_id=name, prompt_token_ids=(1, 2, 3), sampling=params, index_top_k=None)
    )


def finish(core: EngineCore, each: Callable[[], None] = lambda: None) -> list[Delta]:
    deltas: list[Delta] = []
    while core.has_work:
        output = core.step()
        assert output is not None
        deltas.extend(output.deltas)
        each()
    assert core.step() is None
    return deltas


def test_the_next_step_is_launched_before_the_result_of_this_one_is_awaited() -> None:
    device = Device()
    core = core_of(device)
    submit(core, "a", 3)
    deltas = finish(core)
    assert device.log == ["launch 1", "launch 2", "result 1", "launch 3", "result 2", "result 3"]
    assert device.most_waiting == 2
    assert [delta.token_ids for delta in deltas] == [(5,), (5,), (5,)]
    assert deltas[-1].finish_reason == "length"


def test_a_step_that_cannot_be_launched_ends_its_requests_after_the_tokens_before_it() -> None:
    device = Device()
    device.fails = 2
    core = core_of(device)
    submit(core, "a", 5)
    deltas = finish(core)
    assert [(delta.token_ids, delta.finish_reason) for delta in deltas] == [((5,), None), ((), "error")]
    assert deltas[-1].error is not None
    assert "RuntimeError: out of memory" in deltas[-1].error
    assert core.stats().pages_used == 0
    submit(core, "b", 2)
    assert [delta.finish_reason for delta in finish(core)] == [None, "length"]
    assert not core.broken


def test_a_step_whose_only_request_has_ended_is_paid_by_nobody() -> None:
    device = Device()
    core = core_of(device)
    submit(core, "a", 9, stop=(5,))
    deltas = finish(core)
    assert device.log == ["launch 1", "launch 2", "result 1", "result 2"]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].usage is not None
    assert deltas[-1].usage.work.device_seconds == pytest.approx(1.0)
    assert core.stats().busy_seconds_total == pytest.approx(1.0)


def test_seconds_of_steps_that_overlap_are_counted_once() -> None:
    device = Device()
    core = core_of(device)
    submit(core, "a", 4)
    submit(core, "b", 6)
    spent = {d.request_id: d.usage.work.device_seconds for d in finish(core) if d.usage is not None}
    assert sum(spent.values()) == pytest.approx(core.stats().busy_seconds_total) == pytest.approx(device.now)


def test_an_abort_needs_no_wait() -> None:
    device = Device()
    core = core_of(device)
    submit(core, "a", 9)
    submit(core, "b", 4)
    core.step()
    (delta,) = core.abort("a")
    assert delta.finish_reason == "abort"
    assert core.stats().pages_used == 1, "b's"
    assert {one.request_id for one in finish(core)} == {"b"}


def test_pending_tokens_have_no_id() -> None:
    assert PENDING < 0
