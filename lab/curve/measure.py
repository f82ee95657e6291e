"""Times steps of the real runner at chosen positions, dense and sparse in turn, and computes their cost.

A step at position p finds p tokens of its request in the cache. Their keys and values are random numbers, written
directly into the pages, because the cost of a step does not depend on them. With random index keys the selected
tokens lie all over the context, which is the worst case for gathering them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from engine.attention.batch import build_batch
from engine.attention.tiling import Tiling
from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError
from engine.kernels.choice import choose_backend
from engine.memory.planes import PagedCache, page_bytes
from engine.models import read_model
from engine.models.family import Placement
from engine.plan.sparsity import is_dense
from engine.step.runner import Runner
from lab.calibrate.steps import Bench, StepCase
from lab.curve.shape import config, random_source
from lab.inspect.roofline import Phase
from lab.tool import StageProgress

Attention = Literal["dense", "sparse"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ATTENTION: tuple[Attention, ...] = ("dense", "sparse")


class CurvePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One point of one curve."""

    phase: Phase
    attention: Attention
    position: int  # tokens of each request before the step
    forms: tuple[
        str, ...
    ] = ()  # the forms of attention in the step's tiles: dense, gather, mask; expanded or not
    tokens: int  # tokens computed in a step: the rows of the chunk, or one for each stream
    seconds: tuple[float, ...]  # of each measured step

    @property
    def token_seconds(self) -> float:
        """The median time of a step, divided by its tokens."""
        return statistics.median(self.seconds) / self.tokens

    def usd(self, price_an_hour: float) -> float:
        """Return the cost of a million tokens in USD, if the machine costs `price_an_hour` USD."""
        return self.token_seconds * 1e6 / 3600 * price_an_hour


@dataclass(frozen=True, kw_only=True)
class CurvePlan:
    """What to measure."""

    positions: tuple[int, ...]
    chunk: int  # rows of a prefill step
    streams: int  # requests of a decode step
    rounds: int
    quick: bool
    device: torch.device
    dtype: torch.dtype
    cpu_time: bool = False  # measure the process's CPU time instead of the wall clock

    def __post_init__(self) -> None:
        for name in ("chunk", "streams", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.positions or min(self.positions) < 0 or len(set(self.positions)) < len(self.positions):
            raise ConfigError("positions must be different numbers of tokens, 0 or more")


class Lab:
    """The model, with a cache full of random numbers."""

    def __init__(self, plan: CurvePlan, progress: StageProgress) -> None:
        """Make the model and fill the cache.

        Raises:
            ConfigError: a chunk at the last position would end beyond the model's positions.
        """
        settings = config(quick=plan.quick)
        self.index_top_k: int = settings["index_topk"]
        longest, limit = max(plan.positions), int(settings["max_position_embeddings"])
        needed = longest + plan.chunk
        if needed > limit:
            raise ConfigError(
                f"a chunk of {plan.chunk} at position {longest} ends beyond the model's {limit} positions; "
                "lower positions or chunk"
            )
        defaults = EngineConfig(weights="")
        kernels = choose_backend("auto", plan.device)
        self.kernels = kernels.name
        source = random_source(settings, plan.device)
        model, self.report = read_model(source).build(
            source,
            None,
            Placement(kernels, needed, plan.dtype, plan.device),
            lambda done, total: progress("making weights", done, total),
        )
        self.settings = settings
        specs = model.plane_specs()
        pages = max(plan.streams * (longest // PAGE_SIZE + 1), -(-needed // PAGE_SIZE))
        self.cache = PagedCache(pages, specs, model.num_layers, plan.device)
        self.cache_bytes = pages * page_bytes(specs, model.num_layers)
        fill(
            self.cache, [(layer, spec.name) for layer in range(model.num_layers) for spec in specs], progress
        )
        self._costs = model.tile_costs(defaults.score_budget_bytes, "auto")
        self._bench = Bench(
            Runner(model, self.cache, self._costs, plan.device),
            self.cache,
            model.vocab_size,
            plan.chunk,
            time.process_time if plan.cpu_time else time.perf_counter,
        )
        self._device = plan.device

    def case(self, phase: Phase, attention: Attention, position: int, plan: CurvePlan) -> StepCase:
        """Make the step for a point of a curve."""
        rows, requests = (plan.chunk, 1) if phase == "prefill" else (1, plan.streams)
        index_top_k = None if attention == "dense" else self.index_top_k
        # Only a decode step draws tokens. A prefill step is a chunk in the middle of a prompt.
        return StepCase(
            phase, position, rows, requests, index_top_k, sampled=phase == "decode", held_out=False
        )

    def forms(self, case: StepCase) -> tuple[str, ...]:
        """Return the different forms of attention that the engine chooses for the tiles of a step."""
        tiling = Tiling(build_batch(self._bench.plan(case), self._device), self._costs)
        return tuple(
            dict.fromkeys(tile.form + (" expanded" if tile.expanded else "") for tile in tiling.tiles)
        )

    def seconds(self, case: StepCase) -> float:
        """Run a step once; return the seconds that it took."""
        return self._bench.seconds(case)


def fill(
    cache: PagedCache, planes: Iterable[tuple[int, str]], progress: StageProgress, at_once: int = 256
) -> None:
    """Fill planes with random numbers of the normal distribution, `at_once` pages at a time."""
    generator = torch.Generator().manual_seed(1)
    for layer, name in planes:
        plane = cache.plane(layer, name)
        for first in range(0, len(plane), at_once):
            progress(f"filling the cache, {name}", first, len(plane))
            part = plane[first : first + at_once]
            part.copy_(torch.randn(part.shape, generator=generator))


def measure(plan: CurvePlan, lab: Lab, progress: StageProgress) -> list[CurvePoint]:
    """Measure every point of the four curves once in each round. Dense and sparse take turns, so both get the noise."""
    places: list[tuple[Phase, int]] = [(phase, position) for phase in PHASES for position in plan.positions]
    cases = {
        (phase, attention, position): lab.case(phase, attention, position, plan)
        for phase, position in places
        for attention in ATTENTION
    }
    for phase in PHASES:  # run one step of each kind first: its set-up must not be measured
        for attention in ATTENTION:
            shortest = min(
                (p for p in plan.positions if not is_dense(p, lab.index_top_k)), default=max(plan.positions)
            )
            lab.seconds(cases[phase, attention, shortest])
    times: dict[tuple[Phase, Attention, int], list[float]] = {key: [] for key in cases}
    total, done = plan.rounds * len(cases), 0
    for turn in range(plan.rounds):
        for phase, position in places:
            for attention in ATTENTION if turn % 2 == 0 else reversed(ATTENTION):
                progress(f"measuring {phase}", done, total)
                times[phase, attention, position].append(lab.seconds(cases[phase, attention, position]))
                done += 1
    return [
        CurvePoint(
            phase=phase, attention=attention, position=position, forms=lab.forms(case),
            tokens=case.rows * case.requests, seconds=tuple(times[phase, attention, position]),
        )
        for (phase, attention, position), case in cases.items()
    ]  # fmt: skip


def crossover(points: Sequence[CurvePoint], phase: Phase, index_top_k: int) -> float | None:
    """Return the position from which on sparse is cheaper than dense; None if dense is cheaper at the last position.

    Between measured positions the cost is taken as a straight line. Positions whose rows are dense in both are left out.
    """
    gains = sorted(
        (position, _cost(points, phase, "dense", position) - _cost(points, phase, "sparse", position))
        for position in {
            p.position for p in points if p.phase == phase and not is_dense(p.position + 1, index_top_k)
        }
    )
    if not gains or gains[-1][1] <= 0:
        return None
    losing = [i for i, (_, gain) in enumerate(gains) if gain <= 0]
    if not losing:
        return float(gains[0][0])
    (p, a), (q, b) = gains[losing[-1]], gains[losing[-1] + 1]
    return p + (q - p) * -a / (b - a)


def growth(points: Sequence[CurvePoint], phase: Phase, attention: Attention, low: int, high: int) -> float:
    """Return (cost at `high`) / (cost at `low`). Both positions must have been measured."""
    return _cost(points, phase, attention, high) / _cost(points, phase, attention, low)


def _cost(points: Sequence[CurvePoint], phase: Phase, attention: Attention, position: int) -> float:
    return next(
        p.token_seconds for p in points if (p.phase, p.attention, p.position) == (phase, attention, position)
    )
