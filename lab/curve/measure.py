"""Steps of the real runner at chosen positions, dense and sparse in turn, and what they cost.

A step at position p finds p tokens of its request in the cache. Those are random numbers written straight into
the pages, never computed: what a step costs does not depend on them. Random index keys scatter the selected tokens
over the whole context, which is the worst case for gathering them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
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
from lab.calibrate.steps import Bench, Case
from lab.curve.shape import RandomSource, config

Phase = Literal["prefill", "decode"]
Attention = Literal["dense", "sparse"]
Progress = Callable[[str, int, int], None]

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ATTENTION: tuple[Attention, ...] = ("dense", "sparse")


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One place of one curve."""

    phase: Phase
    attention: Attention
    position: int  # tokens of each request before the step
    forms: tuple[str, ...]  # how the engine attended, of its tiles: dense, gather, mask; expanded or not
    tokens: int  # computed in a step: rows of the chunk, or one of each stream
    seconds: tuple[float, ...]  # each measured step

    @property
    def token_seconds(self) -> float:
        """Median step, divided by its tokens."""
        return statistics.median(self.seconds) / self.tokens

    def usd(self, price_an_hour: float) -> float:
        """USD for a million tokens, with the machine at this price."""
        return self.token_seconds * 1e6 / 3600 * price_an_hour


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure."""

    positions: tuple[int, ...]
    chunk: int  # rows of a prefill step
    streams: int  # of a decode step
    rounds: int
    quick: bool
    device: torch.device
    dtype: torch.dtype
    cpu_time: bool = False  # of the process, in place of the clock's

    def __post_init__(self) -> None:
        for name in ("chunk", "streams", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.positions or min(self.positions) < 0 or len(set(self.positions)) < len(self.positions):
            raise ConfigError("positions must be different numbers of tokens, 0 or more")


class Lab:
    """The model over a cache full of random numbers."""

    def __init__(self, plan: Plan, progress: Progress) -> None:
        """Make both.

        Raises:
            ConfigError: a position beyond the model's, or one that the sizes do not allow.
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
        source = RandomSource(settings)
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

    def case(self, phase: Phase, attention: Attention, position: int, plan: Plan) -> Case:
        """The step that stands for a place of a curve."""
        rows, requests = (plan.chunk, 1) if phase == "prefill" else (1, plan.streams)
        index_top_k = None if attention == "dense" else self.index_top_k
        # A prompt's chunk is followed by another: only a decode step draws tokens.
        return Case(phase, position, rows, requests, index_top_k, sampled=phase == "decode", held_out=False)

    def forms(self, case: Case) -> tuple[str, ...]:
        """Of its tiles, as the engine cuts them."""
        tiling = Tiling(build_batch(self._bench.plan(case), self._device), self._costs)
        return tuple(
            dict.fromkeys(tile.form + (" expanded" if tile.expanded else "") for tile in tiling.tiles)
        )

    def seconds(self, case: Case) -> float:
        """Run it once."""
        return self._bench.seconds(case)


def fill(
    cache: PagedCache, planes: Iterable[tuple[int, str]], progress: Progress, at_once: int = 256
) -> None:
    """Write normal numbers everywhere, `at_once` pages at a time."""
    generator = torch.Generator().manual_seed(1)
    for layer, name in planes:
        plane = cache.plane(layer, name)
        for first in range(0, len(plane), at_once):
            progress(f"filling the cache, {name}", first, len(plane))
            part = plane[first : first + at_once]
            part.copy_(torch.randn(part.shape, generator=generator))


def measure(plan: Plan, lab: Lab, progress: Progress) -> list[Point]:
    """Every place of the four curves, once a round; dense and sparse take turns, so that noise falls on both."""
    places: list[tuple[Phase, int]] = [(phase, position) for phase in PHASES for position in plan.positions]
    cases = {
        (phase, attention, position): lab.case(phase, attention, position, plan)
        for phase, position in places
        for attention in ATTENTION
    }
    for phase in PHASES:  # what the first step of a kind sets up is not measured
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
        Point(
            phase=phase, attention=attention, position=position, forms=lab.forms(case),
            tokens=case.rows * case.requests, seconds=tuple(times[phase, attention, position]),
        )
        for (phase, attention, position), case in cases.items()
    ]  # fmt: skip


def crossover(points: Sequence[Point], phase: Phase, index_top_k: int) -> float | None:
    """The position from which on sparse is cheaper than dense, between measured ones on a straight line.

    Dense rows cost the same in both, so only what lies beyond them counts; None if dense is the cheaper
    one at the end.
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


def growth(points: Sequence[Point], phase: Phase, attention: Attention, low: int, high: int) -> float:
    """Cost at `high` / cost at `low`, of measured positions."""
    return _cost(points, phase, attention, high) / _cost(points, phase, attention, low)


def _cost(points: Sequence[Point], phase: Phase, attention: Attention, position: int) -> float:
    return next(
        p.token_seconds for p in points if (p.phase, p.attention, p.position) == (phase, attention, position)
    )
