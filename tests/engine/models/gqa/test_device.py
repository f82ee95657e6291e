"""A step over flat rows in Triton's kernels against torch's operations, over the same weights, in float32.

On the CPU the kernels are interpreted. Weights and keys of the reference cache are those of torch's form, so that both
select from the same scores up to rounding.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.config import EngineConfig
from engine.models.gqa.model import GqaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import build
from tests.engine.kit import VOCAB, base_of, random_overlay, tiny_checkpoint
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.models.gqa import device  # noqa: E402 - needs Triton
from engine.models.gqa.device import DeviceStep  # noqa: E402
from engine.models.rows import inputs, padded  # noqa: E402
from engine.models.rows.padded import Padded  # noqa: E402

PAGES = 2
CPU = torch.device("cpu")
Asked = tuple[int, int, int, int | None]  # request, first position, rows, index_top_k
BEFORE: list[Asked] = [(0, 0, 120, None), (1, 0, 63, None), (2, 0, 90, None)]
"""Computed by torch alone, into both caches."""
MIXED: list[Asked] = [(0, 120, 1, 70), (1, 63, 9, 70), (2, 90, 1, None), (3, 0, 3, 70)]
DECODES: list[Asked] = [(0, 121, 1, 70), (1, 72, 1, None), (3, 3, 1, 64)]

FORMS: dict[str, dict[str, Any]] = {
    "llama": {"kind": "llama"},
    "llama, biases, without an overlay": {"kind": "llama", "attention_bias": True, "mlp_bias": True, "overlay": None},
    "qwen3, integer keys": {"kind": "qwen3", "head_dim": 16, "attention_bias": True, "indexer_dtype": "int8"},
}  # fmt: skip


def plan_of(asked: list[Asked], tokens: list[list[int]]) -> StepPlan:
    return StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=str(number),
                token_ids=tuple(tokens[number][start : start + rows]),
                start=start,
                page_ids=tuple(range(number * PAGES, number * PAGES + PAGES)),
                index_top_k=index_top_k,
                sample=None,
            )
            for number, start, rows, index_top_k in asked
        )
    )


class Twin:
    """One checkpoint, computed by torch and by a device step, each over a cache of its own."""

    def __init__(
        self, folder: Path, form: dict[str, Any], budget_bytes: int, *, invariant: bool = False
    ) -> None:
        form = dict(form)
        own = {name: form.pop(name) for name in ("indexer_dtype",) if name in form}
        rank, overlay = form.pop("rank", 3), None
        with_overlay = form.pop("overlay", "") is not None
        tiny_checkpoint(folder, max_position_embeddings=PAGES * 64, num_hidden_layers=2, **form)
        if with_overlay:
            overlay = str(random_overlay(folder / "indexer.safetensors", base_of(folder), rank=rank))
        config = EngineConfig(
            weights=str(folder), overlay=overlay, device="cpu", dtype="float32", kernels="torch",
            kv_cache_bytes=4 << 20, **own,
        )  # fmt: skip
        self.torch, self.rows = build(config), build(config)
        self.budget_bytes = budget_bytes
        self.tokens = torch.randint(0, VOCAB, (4, 128), generator=torch.Generator().manual_seed(3)).tolist()
        model = self.rows.runner._model
        assert isinstance(model, GqaModel)
        assert DeviceStep.supports(model)
        model.batch_invariant = invariant
        self.step = DeviceStep(model)

    def padded(self, asked: list[Asked], prompts: bool) -> Tensor:
        """The rows in a buffer of one shape, with room for more of everything."""
        batch = build_batch(plan_of(asked, self.tokens), CPU)
        top_k = 128 if int(batch.index_top_k.max()) else 0
        shape = Padded(16, PAGES * 64, top_k, prompts, 4 if prompts else 0, self.step.sharing)
        assert shape.holds(batch)
        buffer = torch.full((shape.size,), 7, dtype=torch.int32)  # what the step before left
        shape.fill(buffer.numpy(), batch)
        return self.step.compute(shape.inputs(buffer), self.rows.cache)[: len(batch.token_ids)]

    def both(self, asked: list[Asked]) -> tuple[Tensor, Tensor]:
        plan = plan_of(asked, self.tokens)
        ours = self.step.forward(build_batch(plan, CPU), self.rows.cache, self.budget_bytes)
        return ours, self.torch.runner.hidden(plan)


@pytest.mark.model
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("invariant", [False, True])
def test_hidden_states_are_those_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, invariant: bool
) -> None:
    """Chunks, decodes, dense and sparse rows in any mix; scores come in pieces of 8 rows."""
    # Each program that has nothing to do takes the interpreter long enough.
    monkeypatch.setattr(inputs, "CONTEXT_STEP", 64)
    monkeypatch.setattr(padded, "MOST_SPANS", 3)
    twin = Twin(tmp_path, FORMS[form], 4 * PAGES * 64 * 8, invariant=invariant)
    sparse = twin.torch.ready.model.indexer is not None
    twin.torch.runner.hidden(plan_of(BEFORE, twin.tokens))
    for i in range(2):
        for spec in twin.torch.runner._model.plane_specs():
            twin.rows.cache.plane(i, spec.name).copy_(twin.torch.cache.plane(i, spec.name))
    for asked in (MIXED, DECODES):
        ours, theirs = twin.both([one if sparse else (*one[:3], None) for one in asked])
        filled = twin.padded(asked, prompts=asked is MIXED and not invariant)
        torch.testing.assert_close(filled, ours, rtol=1e-5, atol=1e-5)
        assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max()), asked


@pytest.mark.model
def test_few_rows_have_the_bits_of_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one launch does for few rows, hidden states and both planes, is what more launches do for many."""
    monkeypatch.setattr(inputs, "CONTEXT_STEP", 64)
    twin = Twin(tmp_path, FORMS["qwen3, integer keys"], 1 << 20)
    twin.torch.runner.hidden(plan_of(BEFORE, twin.tokens))
    cache, planes = twin.rows.cache, [spec.name for spec in twin.torch.runner._model.plane_specs()]
    told = []
    for few in (256, 0):
        monkeypatch.setattr(device, "FEW_ROWS", few)
        for i in range(2):
            for name in planes:
                cache.plane(i, name).copy_(twin.torch.cache.plane(i, name))
        hidden = twin.step.forward(build_batch(plan_of(MIXED, twin.tokens), CPU), cache, 1 << 20)
        told.append([hidden, *(cache.plane(i, name).clone() for i in range(2) for name in planes)])
    for ours, theirs in zip(*told, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.model
def test_a_window_is_declined(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, kind="mistral", sliding_window=40)
    config = EngineConfig(weights=str(tmp_path), device="cpu", dtype="float32", kv_cache_bytes=4 << 20)
    model = build(config).runner._model
    assert isinstance(model, GqaModel)
    assert not DeviceStep.supports(model)
