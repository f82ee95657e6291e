"""What a step over rows reads lies where kernels expect it, and a rehearsal writes nothing."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.config import EngineConfig
from engine.memory.planes import PagedCache
from engine.models.gqa.model import GqaModel
from engine.models.mla.model import MlaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import build
from tests.engine.kit import base_of, random_overlay, tiny_checkpoint
from tests.engine.models.mla.kit import tiny_deepseek
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from triton.runtime.interpreter import GridExecutor  # noqa: E402 - needs Triton

from engine.kernels.triton.kernel import _COUNTS  # noqa: E402
from engine.models.gqa.device import DeviceStep  # noqa: E402
from engine.models.mla.device import LatentStep  # noqa: E402
from engine.models.rows.inputs import ALIGNED, RowInputs, Sharing, row_inputs  # noqa: E402
from engine.models.rows.rehearsal import contexts_of, rehearsals  # noqa: E402
from engine.models.rows.step import RowsStep  # noqa: E402

CPU = torch.device("cpu")
SHARING = Sharing(attended=16, scored=4, alone=1, tokens=128)


@pytest.mark.parametrize("rows", [65, 66, 67, 129])
def test_addresses_are_of_one_kind(rows: int) -> None:
    """Kernels are compiled for addresses and lines that are multiples of 16 bytes: any number of rows has these."""
    asked = ScheduledRequest(
        request_id="0",
        token_ids=(0,) * rows,
        start=200,
        page_ids=tuple(range(6)),
        index_top_k=100,
        sample=None,
    )
    batch = build_batch(StepPlan(requests=(asked,)), CPU)
    inputs = row_inputs(batch, CPU, 4 * 1024 * 40, SHARING)
    vectors = [inputs.token_ids, inputs.pages, inputs.offsets]
    for of in (inputs.rows, *(piece.rows for piece in inputs.pieces)):
        vectors += [of.request, of.positions, of.index_top_k, of.block_table]
        assert of.block_table.stride(0) % ALIGNED == 0
    assert all(one.data_ptr() % 16 == 0 for one in vectors)
    assert inputs.token_ids.tolist() == [0] * rows
    assert inputs.rows.positions.tolist() == list(range(200, 200 + rows))
    assert inputs.rows.block_table[0].tolist()[:6] == list(range(6))
    assert inputs.top_k == 112  # the next multiple of 16
    sizes = [len(piece.rows) for piece in inputs.pieces]
    assert sum(sizes) == rows
    assert max(sizes) <= 48  # 40 fit the budget; a piece is whole sixteens
    assert [piece.first for piece in inputs.pieces] == [sum(sizes[:n]) for n in range(len(sizes))]


def test_blocks_of_every_round_are_of_one_kind() -> None:
    dense = ScheduledRequest(
        request_id="0", token_ids=(0,) * 70, start=9000, page_ids=(0,) * 142, index_top_k=None, sample=None
    )
    plan = row_inputs(build_batch(StepPlan(requests=(dense,)), CPU), CPU, 1 << 20, SHARING).dense
    assert plan is not None
    assert plan.rounds > 1
    assert all(part.data_ptr() % 16 == 0 for part in (*plan.pages, *plan.blocks))


def built(folder: Path) -> tuple[LatentStep, PagedCache]:
    tiny_deepseek("deepseek_v32", folder, num_hidden_layers=3, first_k_dense_replace=1)
    engine = build(
        EngineConfig(
            weights=str(folder), device="cpu", dtype="float32", kernels="torch", kv_cache_bytes=8 << 20
        )
    )
    model = engine.runner._model
    assert isinstance(model, MlaModel)
    return LatentStep(model), engine.cache


def grouped(folder: Path) -> tuple[DeviceStep, PagedCache]:
    tiny_checkpoint(folder, max_position_embeddings=128, num_hidden_layers=3, kind="llama")
    overlay = random_overlay(folder / "indexer.safetensors", base_of(folder), rank=3)
    engine = build(
        EngineConfig(
            weights=str(folder), overlay=str(overlay), device="cpu", dtype="float32", kernels="torch",
            kv_cache_bytes=4 << 20,
        )
    )  # fmt: skip
    model = engine.runner._model
    assert isinstance(model, GqaModel)
    return DeviceStep(model), engine.cache


@pytest.mark.interpreted
@pytest.mark.model
def test_a_rehearsal_writes_nothing(tmp_path: Path) -> None:
    step, cache = built(tmp_path)
    assert len(step._kinds) == 2  # a layer with an MLP, and two alike with experts
    planes = [cache.plane(i, name) for i in range(3) for name in ("latent", "index_key")]
    before = [plane.clone() for plane in planes]
    made = list(rehearsals(1, [80], 4, 1 << 20, SHARING, CPU))
    assert {(inputs.top_k > 0, inputs.dense is not None) for inputs in made} >= {(True, False), (False, True)}
    for inputs in made[:3]:
        hidden = step._through(step._kinds, inputs, cache)
        assert bool(torch.isfinite(hidden).all())
    assert all(torch.equal(one, other) for one, other in zip(planes, before, strict=True))


class Launches:
    """What would be compiled: each kernel that is launched, and what it is compiled for. Nothing is computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: set[tuple[object, ...]] = set()
        monkeypatch.setattr(
            GridExecutor, "__call__", lambda executor, *given, **named: self.note(executor, given, named)
        )

    def note(self, executor: Any, given: tuple[object, ...], named: dict[str, object]) -> None:
        names, constants = parameters(executor.fn)
        known = {name: kind(name, value) for name, value in zip(names, given, strict=False)}
        known |= {
            name: value if name in constants or name not in names else kind(name, value)
            for name, value in named.items()
        }
        self.found.add((executor.fn.__name__, *sorted((name, str(value)) for name, value in known.items())))


@cache
def parameters(kernel: Callable[..., Any]) -> tuple[list[str], frozenset[str]]:
    """All, and those that are compiled into the kernel."""
    found = inspect.signature(kernel).parameters
    return list(found), frozenset(name for name, of in found.items() if "constexpr" in str(of.annotation))


def kind(name: str, value: object) -> object:
    """What Triton compiles a kernel for, of an argument."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and name not in _COUNTS:
        return "one" if value == 1 else value % 16 == 0
    return type(value)


@pytest.mark.interpreted
@pytest.mark.model
@pytest.mark.parametrize("family", ["latent", "grouped"])
def test_no_step_wants_a_kernel_that_was_not_rehearsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Random steps of up to 2048 rows, in contexts of up to 160 K."""
    longest, max_rows, top_k, budget = 163_840, 64, 2048, 1 << 27
    step: RowsStep
    step, cache = built(tmp_path) if family == "latent" else grouped(tmp_path)
    sharing = step.sharing

    def run(inputs: RowInputs) -> None:
        step.sample(inputs, cache)

    launches = Launches(monkeypatch)
    for inputs in rehearsals(max_rows, contexts_of(longest), top_k, budget, sharing, CPU):
        run(inputs)
    rehearsed = set(launches.found)
    random = Random(7)
    for _ in range(300):
        asked: list[tuple[int, int, int | None]] = []
        left = random.choice((64, 300, 1000, 2048))
        while left > 0 and len(asked) < max_rows:
            rows = min(left, random.choice((1, 1, 1, 2, 64, 65, random.randint(1, 2048))))
            end = rows + int(longest ** random.random()) if random.random() < 0.9 else longest
            asked.append((rows, min(max(end, rows), longest) - rows, random.choice((None, top_k, top_k))))
            left -= rows
        batch = build_batch(
            StepPlan(
                requests=tuple(
                    ScheduledRequest(
                        request_id=str(number), token_ids=(0,) * rows, start=start,
                        page_ids=(0,) * (-(-(start + rows) // 64)), index_top_k=index_top_k, sample=None,
                    )
                    for number, (rows, start, index_top_k) in enumerate(asked)
                )
            ),
            CPU,
        )  # fmt: skip
        run(row_inputs(batch, CPU, budget, sharing))
    new = launches.found - rehearsed
    assert not new, [(one[0], nearest(one, rehearsed)) for one in new]


def nearest(one: tuple[object, ...], known: set[tuple[object, ...]]) -> object:
    """What differs from the most similar known one."""
    alike = [set(one) - set(other) for other in known if other[0] == one[0]]
    return min(alike, key=len, default="never launched")
