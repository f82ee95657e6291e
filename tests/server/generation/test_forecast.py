"""Who is let in under a bound in seconds gets a first token in time: real admission, scheduler and pace, simulated seconds."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count

import msgspec
import pytest

from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.plan.tiles import TileCosts
from engine.plan.types import Sampled, StepPlan, StepResult
from engine.protocol import SamplingParams, Submit
from server.generation.admission import Admission, QueueFullError, QueuePlace
from server.generation.forecast import ENOUGH, LAST, MOST_FACTOR, UNKNOWN_FACTOR, UNSEEN, Forecast

PROMPT, OUTPUT = 64, 8
SHAPE = ModelShape(
    row_flops=200_000_000, sparse_row_flops=9_000_000, head_flops=50_000_000, pair_flops=69_000,
    index_pair_flops=31_000, weight_bytes=280 << 20, kv_token_bytes=23_040, index_token_bytes=3840,
)  # fmt: skip
TILES = TileCosts(budget_bytes=64 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=768)
ASSUMED = CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu", "native"), TILES)
TRUE = ASSUMED.replace(  # what two cores with AVX2 take, which the pace does not know
    msgspec.structs.replace(ASSUMED.coefficients, step=5e-3, lone=5.3e-3, chunk=3e-3, row=2.4e-3)
)


class Machine:
    """A server whose steps take the modelled seconds, times what other work on the machine adds.

    Args:
        bound: the admission's, in seconds.
        noise: the standard deviation of a step's logarithm.
        drift: the same of a factor that lasts for some seconds.
    """

    def __init__(self, bound: float | None, *, noise: float = 0.0, drift: float = 0.0) -> None:
        self.now = 0.0
        self.chance = random.Random(3)
        self.noise, self.drift, self._slow = noise, drift, 0.0
        self.admission = Admission(256, max_seconds=bound, clock=lambda: self.now)
        self.scheduler = Scheduler(
            2048, token_budget=512, max_running=64, max_model_len=1024, prefix_caching=True, pace=CostPace(ASSUMED)
        )  # fmt: skip
        self.waits: list[float] = []
        self.ends: list[float] = []
        self.refused = 0
        self._names = count()
        self._held: dict[str, tuple[float, ExitStack, QueuePlace, Callable[[], None]]] = {}
        self._plan: tuple[float, StepPlan] | None = None

    def arrive(self, after: Callable[[], None] = lambda: None) -> None:
        """One request comes now. `after` is called when it ends."""
        stack = ExitStack()
        try:
            self.admission.check()
            place = stack.enter_context(self.admission.admit(1, tokens=PROMPT))
        except QueueFullError:
            self.refused += 1
            return
        name = f"r{next(self._names)}"
        prompt = tuple(self.chance.randrange(20_000) for _ in range(PROMPT))
        params = SamplingParams(max_tokens=OUTPUT, seed=0)
        submit = Submit(request_id=name, prompt_token_ids=prompt, sampling=params, index_top_k=None)
        self.scheduler.add(submit, self.now)
        self._held[name] = (self.now, stack, place, after)

    def run(self, arrivals: Iterator[float], until: float) -> None:
        """Go on until that time."""
        arrival = next(arrivals, math.inf)
        while True:
            if self._plan is None and (plan := self.scheduler.schedule(self.now)) is not None:
                self._plan = (self.now + self._seconds(plan), plan)
            end = math.inf if self._plan is None else self._plan[0]
            if min(arrival, end) > until:
                self.now = until
                return
            self.now = min(arrival, end)
            if arrival <= end:
                self.arrive()
                arrival = next(arrivals, math.inf)
            else:
                self._finish()

    def storm(self, rate: float, seconds: float) -> None:
        """Requests at a mean rate, whatever becomes of them."""

        def arrivals() -> Iterator[float]:
            at = self.now
            while True:
                yield (at := at + self.chance.expovariate(rate))

        self.run(arrivals(), self.now + seconds)

    def _seconds(self, plan: StepPlan) -> float:
        seconds = TRUE.seconds(plan)
        kept = math.exp(-seconds / 5)
        self._slow = self._slow * kept + self.chance.gauss(0, self.drift) * math.sqrt(1 - kept**2)
        return seconds * math.exp(self._slow + self.chance.gauss(0, self.noise))

    def _finish(self) -> None:
        assert self._plan is not None
        _, plan = self._plan
        self._plan = None
        drawn = Sampled(token_ids=(7,))
        result = StepResult(sampled=tuple(drawn if one.sample else Sampled() for one in plan.requests))
        for delta in self.scheduler.apply(plan, result, self.now):
            began, stack, place, after = self._held[delta.request_id]
            if place._tokens:
                self.waits.append(self.now - began)
                place.begun()
            if delta.finish_reason is not None:
                del self._held[delta.request_id]
                stack.close()
                self.ends.append(self.now)
                after()


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[int(part * len(values))]


@pytest.mark.parametrize(("noise", "drift"), [(0.0, 0.0), (0.3, 0.0), (0.2, 0.2)])
@pytest.mark.parametrize("bound", [1.0, 3.0])
def test_four_times_the_capacity_keeps_the_bound_and_the_machine_busy(
    bound: float, noise: float, drift: float
) -> None:
    alone = Machine(None)
    alone.arrive()
    alone.run(iter(()), 10)
    machine = Machine(bound, noise=noise, drift=drift)

    def again() -> None:
        if machine.now < 40:
            machine.arrive(again)

    machine.admission.max_seconds = None
    for _ in range(8):
        machine.arrive(again)
    machine.run(iter(()), 60)
    capacity = sum(10 < end < 40 for end in machine.ends) / 30
    machine.admission.max_seconds = bound
    machine.waits.clear()
    ended = len(machine.ends)
    machine.storm(4 * capacity, 180)
    assert quantile(machine.waits, 0.99) <= bound + 2 * alone.waits[0]
    assert quantile(machine.waits, 0.5) >= 0.4 * bound  # it is a queue still
    assert (len(machine.ends) - ended) / 180 >= 0.9 * capacity
    assert machine.refused > 2 * 180 * capacity


def test_the_factor_is_the_largest_of_late_and_never_below_one() -> None:
    forecast = Forecast()
    assert forecast.seconds(2.0) == 2 * UNKNOWN_FACTOR * UNSEEN
    forecast.compare(2.0, 3.0, bound=3.0)
    assert forecast.factor == 1.5
    for _ in range(ENOUGH):
        forecast.compare(2.0, 1.6, bound=3.0)
    assert forecast.factor == 1.5
    for _ in range(LAST):
        forecast.compare(2.0, 1.6, bound=3.0)
    assert forecast.factor == 1.0


def test_waits_far_from_the_bound_and_stops_of_the_engine_say_little() -> None:
    forecast = Forecast()
    forecast.compare(0.1, 0.9, bound=3.0)  # one step, for a prompt of a few tokens
    assert forecast.factor == UNKNOWN_FACTOR
    forecast.compare(2.0, 60.0, bound=3.0)
    assert forecast.factor == MOST_FACTOR
    for _ in range(LAST):  # what is let in under that factor is enough to learn from
        forecast.compare(1.0, 1.0, bound=3.0)
    assert forecast.factor == 1.0


def test_a_bound_in_seconds_lets_one_in_alone_and_says_what_it_expects() -> None:
    now = 0.0
    admission = Admission(100, max_seconds=2.0, clock=lambda: now)
    with admission.admit(1, tokens=10_000):  # nothing is known
        pass
    with admission.admit(1, tokens=100) as place:
        now += 1.0
        place.begun()
    with admission.admit(1, tokens=400) as place:  # 4 s
        full = pytest.raises(QueueFullError, match=r"a first token may take 6\.6 s now, and at most 2 s")
        with full, admission.admit(1, tokens=100):
            pass
        with pytest.raises(QueueFullError):
            admission.check()
        place.begun()
        with admission.admit(1, tokens=100):
            pass


def test_who_leaves_before_a_first_token_is_not_compared() -> None:
    now = 0.0
    admission = Admission(100, max_seconds=2.0, clock=lambda: now)
    with admission.admit(1, tokens=100) as place:
        now += 1.0
        place.begun()
    with admission.admit(1, tokens=150):
        now += 30.0  # the client hangs up
    assert admission._forecast.factor == UNKNOWN_FACTOR
