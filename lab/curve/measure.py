"""Times steps of the real runner at chosen positions, dense and sparse in turn, and computes their cost.

A step at position p finds p tokens of its request in the cache. Their keys and values are random numbers, written
directly into the pages, because the cost of a step does not depend on them. With random index keys the selected
tokens lie all over the context, which is the worst case for gathering them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import msgspec
import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.attention.precision import Precision
from engine.attention.tiling import Tiling
from engine.checkpoint.quantisation import published_in_blocks
from engine.config import PAGE_SIZE, EngineConfig
from engine.errors import ConfigError
from engine.kernels.choice import choose_backend
from engine.memory.blocks import E4M3, num_blocks
from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.memory.planes import PagedCache, page_bytes
from engine.models import read_model
from engine.models.family import Model, Placement
from engine.plan.sparsity import is_dense
from engine.step.device_runner import DeviceRunner
from engine.step.runner import Runner
from lab.calibrate.steps import Bench, StepCase
from lab.curve.shape import config, random_source
from lab.doctor.rates import rates
from lab.inspect.ceilings import Ceilings, ceilings_of
from lab.inspect.roofline import Phase, floor
from lab.inspect.work import HeldModel
from lab.tool import StageProgress

Attention = Literal["dense", "sparse"]

PHASES: tuple[Phase, ...] = ("prefill", "decode")
ATTENTION: tuple[Attention, ...] = ("dense", "sparse")
_AHEAD_STEPS = 16
"""Decode steps of a measurement, where steps are launched ahead."""


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
    floor_seconds: float | None = (
        None  # the least that a step may take; None: the device's rates are not known
    )

    @property
    def token_seconds(self) -> float:
        """The median time of a step, divided by its tokens."""
        return statistics.median(self.seconds) / self.tokens

    @property
    def over_floor(self) -> float | None:
        """The median time of a step over its floor."""
        return None if self.floor_seconds is None else self.token_seconds * self.tokens / self.floor_seconds

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
    fp8: bool = False  # weights, cache and index keys in FP8

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
        settings = config(quick=plan.quick, fp8=plan.fp8)
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
        family, precision = read_model(source), Precision(weights="fp8") if plan.fp8 else Precision()
        model: Model
        model, self.report = family.build(
            source,
            None,
            Placement(kernels, needed, plan.dtype, plan.device, precision),
            lambda done, total: progress("making weights", done, total),
        )
        self.settings = settings
        specs = model.plane_specs()
        pages = max(plan.streams * (longest // PAGE_SIZE + 1), -(-needed // PAGE_SIZE))
        self.cache = PagedCache(pages, specs, model.num_layers, plan.device)
        self.cache_bytes = pages * page_bytes(specs, model.num_layers)
        planes = [(layer, spec.name) for layer in range(model.num_layers) for spec in specs]
        fill(self.cache, planes, progress, layouts={
            "latent": LatentLayout(settings["kv_lora_rank"], settings["qk_rope_head_dim"]),
            "index_key": IndexKeyLayout(settings["index_head_dim"]),
        })  # fmt: skip
        self._costs = model.tile_costs(defaults.score_budget_bytes, "auto")
        self._clock = time.process_time if plan.cpu_time else time.perf_counter
        self._bench = Bench(
            Runner(model, self.cache, self._costs, plan.device),
            self.cache,
            model.vocab_size,
            plan.chunk,
            self._clock,
        )
        self._device = plan.device
        self._ahead = device_runner(model, self.cache, plan, defaults.score_budget_bytes, progress)
        self.rates = rates_of(plan.device)
        name = "fp8" if plan.fp8 else str(plan.dtype).removeprefix("torch.")
        blocks = published_in_blocks if plan.fp8 else lambda name: False
        self._held = HeldModel(family.shape(None), 1, plan.dtype, name, blocks)

    def case(self, phase: Phase, attention: Attention, position: int, plan: CurvePlan) -> StepCase:
        """Make the step for a point of a curve."""
        rows, requests = (plan.chunk, 1) if phase == "prefill" else (1, plan.streams)
        index_top_k = None if attention == "dense" else self.index_top_k
        # Only a decode step draws tokens. A prefill step is a chunk in the middle of a prompt.
        return StepCase(
            phase, position, rows, requests, index_top_k, sampled=phase == "decode", held_out=False
        )

    def forms(self, case: StepCase) -> tuple[str, ...]:
        """Return the different forms of attention that the engine chooses for the tiles of a step; rows have none."""
        if self._ahead is not None:
            return ()
        tiling = Tiling(build_batch(self._bench.plan(case), self._device), self._costs)
        return tuple(
            dict.fromkeys(tile.form + (" expanded" if tile.expanded else "") for tile in tiling.tiles)
        )

    def seconds(self, case: StepCase) -> float:
        """Run a step; return the seconds that it took.

        Where steps are launched ahead, as in serving, some are run, each launched while the one before it computes.
        """
        if self._ahead is None:
            return self._bench.seconds(case)
        plan, count = self._bench.plan(case), _AHEAD_STEPS if case.rows == 1 else 2
        flights = [self._ahead.launch(plan), self._ahead.launch(plan)]
        flights.pop(0).result()
        began = self._clock()
        for _ in range(count - 1):
            flights.append(self._ahead.launch(plan))
            flights.pop(0).result()
        flights.pop(0).result()
        return (self._clock() - began) / count

    def floor(self, case: StepCase) -> float:
        """The least seconds that a step may take on this device."""
        phase: Phase = "decode" if case.sampled else "prefill"
        tokens = case.rows * case.requests
        return floor(self._held, self.rates, phase, case.start, tokens, case.index_top_k).seconds


def device_runner(
    model: Model, cache: PagedCache, plan: CurvePlan, budget_bytes: int, progress: StageProgress
) -> DeviceRunner | None:
    """Prepare the model's steps as the engine serves them on a GPU: graphs, launched ahead. None: it has no such step."""
    compilers = None
    if plan.device.type == "cuda" and model.row_step is not None:
        from engine.kernels.triton.compiling import Compilers  # needs Triton

        compilers = Compilers()
    try:
        model.prepare(
            cache, plan.streams, lambda done, total: progress("capturing graphs", done, total), compilers
        )
        if model.row_step is None:
            return None
        runner = DeviceRunner(model, model.row_step, cache, budget_bytes, plan.device)
        runner.prepare(compilers)
        return runner
    finally:
        if compilers is not None:
            compilers.close()


def rates_of(device: torch.device) -> Ceilings:
    """Return what a device can do: the known figures of a GPU, or those that are measured now."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    known = ceilings_of(name) if device.type == "cuda" else None
    if known is not None:
        return known
    found = rates(device)
    plain = found.get("float32", found["bf16"] / 2)
    return Ceilings(name, "measured now", found["read"], found["bf16"], found.get("fp8"), plain, math.inf)


def fill(
    cache: PagedCache,
    planes: Iterable[tuple[int, str]],
    progress: StageProgress,
    at_once: int = 256,
    layouts: Mapping[str, LatentLayout | IndexKeyLayout] = MappingProxyType({}),
) -> None:
    """Fill planes with random numbers of the normal distribution, `at_once` pages at a time, on the planes' device.

    Args:
        cache: that has the planes
        planes: (layer, name) of each
        progress: told what is done
        at_once: so many pages are filled at once
        layouts: name -> how the bytes of planes in FP8 lie
    """
    for layer, name in planes:
        plane = cache.plane(layer, name)
        generator = torch.Generator(plane.device).manual_seed(1)
        for first in range(0, len(plane), at_once):
            progress(f"filling the cache, {name}", first, len(plane))
            part = plane[first : first + at_once]
            if part.dtype == torch.uint8:
                _fill_fp8(part, layouts[name], generator)
            else:
                part.copy_(torch.randn(part.shape, generator=generator, device=plane.device))


def _fill_fp8(part: Tensor, layout: LatentLayout | IndexKeyLayout, generator: torch.Generator) -> None:
    """Fill pages of bytes."""
    pages, size, _ = part.shape

    def numbers(count: int) -> Tensor:
        return torch.randn(pages * size, count, generator=generator, device=part.device)

    def scales(count: int) -> Tensor:
        return torch.ones(pages * size, count, device=part.device)

    if isinstance(layout, LatentLayout):
        values = numbers(layout.rank).to(E4M3)
        packed = layout.pack(values, scales(num_blocks(layout.rank)), numbers(layout.rope))
        part.copy_(packed.view(part.shape))
        return
    at = torch.arange(pages * size, device=part.device)
    layout.write(part, at // size, at % size, numbers(layout.dim).to(E4M3), scales(1).flatten())


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
            floor_seconds=lab.floor(case),
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
