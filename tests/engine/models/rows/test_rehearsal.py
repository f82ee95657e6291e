"""What a step over rows reads lies where kernels expect it, and a rehearsal writes nothing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from engine.attention.batch import build_batch
from engine.config import EngineConfig
from engine.models.mla.model import MlaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import build
from tests.engine.models.mla.kit import tiny_deepseek
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.models.mla.device import LatentStep  # noqa: E402 - needs Triton
from engine.models.rows.inputs import ALIGNED, Sharing, row_inputs  # noqa: E402
from engine.models.rows.rehearsal import rehearsals  # noqa: E402

CPU = torch.device("cpu")
SHARING = Sharing(attended=16, scored=4, alone=1, tokens=128)


@pytest.mark.parametrize("rows", [65, 66, 67, 129])
def test_addresses_are_of_one_kind(rows: int) -> None:
    """Kernels are compiled for addresses and lines that are multiples of 16 bytes: any number of rows has these."""
    asked = ScheduledRequest(
        request_id="0",
        token_ids=(0,) * rows,
        start=200,
        page_ids=tuple(range(5)),
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


@pytest.mark.interpreted
@pytest.mark.model
def test_a_rehearsal_writes_nothing(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path, num_hidden_layers=3, first_k_dense_replace=1)
    engine = build(
        EngineConfig(
            weights=str(tmp_path), device="cpu", dtype="float32", kernels="torch", kv_cache_bytes=8 << 20
        )
    )
    model = engine.runner._model
    assert isinstance(model, MlaModel)
    step = LatentStep(model)
    assert len(step._kinds) == 2  # a layer with an MLP, and two alike with experts
    planes = [engine.cache.plane(i, name) for i in range(3) for name in ("latent", "index_key")]
    before = [plane.clone() for plane in planes]
    made = list(rehearsals((6,), (64,), 4, 1 << 20, step.sharing, CPU))
    assert {(inputs.top_k > 0, inputs.dense is not None) for inputs in made} == {
        (True, False),
        (False, False),
    }
    for inputs in made:
        hidden = step._through(step._kinds, inputs, engine.cache)
        assert bool(torch.isfinite(hidden).all())
    assert all(torch.equal(one, other) for one, other in zip(planes, before, strict=True))
