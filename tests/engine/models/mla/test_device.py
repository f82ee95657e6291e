"""The step over flat rows in Triton's kernels against transformers, and against torch's operations over tiles.

On the CPU the kernels are interpreted.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.batch import build_batch
from engine.config import EngineConfig
from engine.kernels.interface.selection import REPEATED
from engine.models.mla.model import MlaModel
from engine.plan.types import ScheduledRequest, StepPlan
from engine.step.build import Built, build
from tests.engine.models.mla.kit import VOCAB, oracle, tiny_deepseek
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.kernels.triton.rows import Rows  # noqa: E402 - needs Triton
from engine.kernels.triton.select import select  # noqa: E402
from engine.models.mla import device, device_layer  # noqa: E402
from engine.models.mla.device import LatentStep  # noqa: E402
from engine.models.rows import inputs, padded  # noqa: E402
from engine.models.rows.audit import MOST_ROWS  # noqa: E402
from engine.models.rows.padded import Padded  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.interpreted]

TOLERANCE = 1e-4  # of the largest logit
TOP_K = 24
PAGES = 2
CHIP = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
Asked = tuple[int, int, int, int | None]  # request, first position, rows, index_top_k

STEPS: list[list[Asked]] = [
    [(0, 0, 60, TOP_K), (1, 0, 30, None)],
    [(0, 60, 1, TOP_K), (1, 30, 40, None), (2, 0, 5, TOP_K), (3, 0, 20, TOP_K)],
    [(0, 61, 2, TOP_K), (1, 70, 1, None), (2, 5, 1, TOP_K), (3, 20, 3, TOP_K)],
    [(0, 63, 7, TOP_K), (3, 23, 30, TOP_K), (1, 71, 1, None)],
]
"""Chunks, decodes and drafts, dense and sparse rows; the second request is dense."""

LONG = [] if torch.cuda.is_available() else [pytest.mark.slow, pytest.mark.timeout(900)]
"""Of tests that take the interpreter a minute or more."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3, no query latent": ("deepseek_v3", {"q_lora_rank": None, "seed": 5}),
    "v32, one layer": ("deepseek_v32", {"num_hidden_layers": 1, "first_k_dense_replace": 0, "seed": 2}),
    "v32": ("deepseek_v32", {}),
    "glm, shared selections": (
        "glm_moe_dsa",
        {"n_group": 1, "topk_group": 1, "seed": 9, "num_hidden_layers": 4, "index_topk_freq": 2, "index_skip_topk_offset": 2},
    ),
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


def built(folder: Path, **settings: Any) -> Built:
    own = {"dtype": "float32", "kernels": "torch", "kv_cache_bytes": 8 << 20, **settings}
    return build(EngineConfig(weights=str(folder), device=CHIP.type, **own))


def stepped(engine: Built) -> tuple[MlaModel, LatentStep]:
    model = engine.runner._model
    assert isinstance(model, MlaModel)
    return model, LatentStep(model)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program that has nothing to do takes the interpreter long enough."""
    monkeypatch.setattr(inputs, "CONTEXT_STEP", 64)
    monkeypatch.setattr(padded, "MOST_SPANS", 3)
    monkeypatch.setattr(device, "MOST_ALONE", 5)


def tokens_of(count: int) -> list[list[int]]:
    return torch.randint(0, VOCAB, (count, 128), generator=torch.Generator().manual_seed(3)).tolist()


def reference(model: Any, tokens: list[int], index_top_k: int | None) -> tuple[Tensor, list[Tensor]]:
    """transformers' logits [T, vocab], and each indexer's selections as masks [T, T]."""
    sets: list[Tensor] = []
    hooks = []
    for layer in model.model.layers:
        indexer = getattr(layer.self_attn, "indexer", None)
        if indexer is not None:
            indexer.index_topk = index_top_k or 10_000
            hooks.append(indexer.register_forward_hook(lambda m, a, out: sets.append(out[0].long())))
    logits = oracle(model, tokens)
    for hook in hooks:
        hook.remove()
    causal = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    return logits, [torch.zeros_like(causal).scatter_(1, one, True) & causal for one in sets]


@pytest.mark.parametrize(
    "variant", [pytest.param(name, marks=[] if name == "v32, one layer" else LONG) for name in VARIANTS]
)
def test_logits_and_selections_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    family, changes = VARIANTS[variant]
    theirs = tiny_deepseek(family, tmp_path, **changes)
    engine = built(tmp_path)
    model, step = stepped(engine)
    sparse = model.indexer is not None
    chosen: list[Tensor] = []
    select = device_layer._selected

    def told(*of: Any) -> Tensor:
        chosen.append(select(*of))
        return chosen[-1]

    monkeypatch.setattr(device_layer, "_selected", told)
    tokens = tokens_of(4)
    ends = [73, 72, 6, 53]
    expected = [
        reference(theirs, own[:end], TOP_K if sparse and number != 1 else None)
        for number, (own, end) in enumerate(zip(tokens, ends, strict=True))
    ]
    budget = 4 * PAGES * 64 * 40  # scores come in pieces of 40 rows
    for asked in STEPS:
        chosen.clear()
        batch = build_batch(plan_of([one if sparse else (*one[:3], None) for one in asked], tokens), CPU)
        logits = step.logits(step.forward(batch, engine.cache, budget)).cpu()
        for segment, (number, start, rows, _) in zip(batch.segments, asked, strict=True):
            logit, sets = expected[number]
            ours = logits[segment.first_row : segment.first_row + rows]
            wanted = logit[start : start + rows]
            assert float((ours - wanted).abs().max()) <= TOLERANCE * float(logit.abs().max()), (asked, number)
            for layer, own in enumerate(chosen):
                for row in range(segment.dense_rows, rows):
                    mine = own[segment.first_row + row].cpu()
                    assert mine[mine >= 0].tolist() == sets[layer][start + row].nonzero().flatten().tolist()
        assert bool(chosen) == (sparse and int(batch.index_top_k.max()) > 0)


def test_layers_that_the_kernels_do_not_compute(tmp_path: Path) -> None:
    """Then torch computes the steps, and says so."""
    tiny_deepseek(
        "deepseek_v32",
        tmp_path,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        index_head_dim=24,
        qk_rope_head_dim=8,
    )
    model, _ = stepped(built(tmp_path))
    (layer,) = model.layers
    plain = model.plane_specs()
    assert device_layer.supports(layer, plain)
    narrow = [replace(spec, dtype=torch.uint8) for spec in plain]
    assert not device_layer.supports(layer, narrow)  # index keys of 24 numbers have no FP8 form
    assert device_layer.supports(layer, [narrow[0], plain[1]])


def both(one: Built, other: Built, asked: list[Asked], tokens: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Hidden states by tiles, and by rows over a copy of the cache before."""
    for i in range(one.runner._model.num_layers):
        for spec in one.runner._model.plane_specs():
            if spec.on(i):
                other.cache.plane(i, spec.name).copy_(one.cache.plane(i, spec.name))
    plan = plan_of(asked, tokens)
    _, step = stepped(other)
    return one.runner.hidden(plan), step.forward(build_batch(plan, CPU), other.cache, 1 << 20)


FORMATS: dict[str, dict[str, Any]] = {
    "fp8 cache and keys": {"kv_cache_dtype": "fp8", "indexer_dtype": "fp8"},
    "fp8 keys": {"indexer_dtype": "fp8"},
}


@pytest.mark.parametrize("form", [pytest.param(name, marks=LONG) for name in FORMATS])
def test_narrow_caches_are_those_of_tiles(tmp_path: Path, form: str) -> None:
    """Everything before is computed by tiles, into both caches; what a step adds is equal up to rounding."""
    tiny_deepseek("deepseek_v32", tmp_path, num_hidden_layers=2)
    tiles, rows = built(tmp_path, **FORMATS[form]), built(tmp_path, **FORMATS[form])
    tokens = tokens_of(4)
    for asked in STEPS:
        wanted, got = both(tiles, rows, asked, tokens)
        assert float((wanted - got).abs().max()) <= 2e-2 * float(wanted.abs().max())


def test_a_buffer_of_one_shape_gives_the_same(tmp_path: Path) -> None:
    """Padding, and room for more of everything, change nothing."""
    tiny_deepseek("deepseek_v32", tmp_path, num_hidden_layers=1, first_k_dense_replace=0)
    one, other = built(tmp_path), built(tmp_path)
    (_, step), (_, filled) = stepped(one), stepped(other)
    tokens = tokens_of(4)
    for asked, prompts in zip(STEPS[1:3], (True, False), strict=True):
        batch = build_batch(plan_of(asked, tokens), CPU)
        plain = step.forward(batch, one.cache, 1 << 20)
        plan = inputs.expanded_plan(batch, filled.sharing)
        shape = Padded(
            80 if prompts else 16,
            PAGES * 64,
            TOP_K,
            prompts,
            8 if prompts else 0,
            filled.sharing,
            plan is not None,
        )
        assert shape.holds(batch)
        buffer = torch.full((shape.size,), 7, dtype=torch.int32)  # what the step before left
        shape.fill(buffer.numpy(), batch)
        given = shape.inputs(buffer.to(CHIP))
        if plan is not None and given.dense is not None:
            assert given.dense.holds(plan)
            given.dense.fill(plan)
        hidden = filled.compute(given, other.cache)[: len(batch.token_ids)]
        torch.testing.assert_close(hidden, plain, rtol=1e-5, atol=1e-5)
        hidden = hidden.clone()
        flaws = torch.zeros(len(batch.token_ids), dtype=torch.int32, device=CHIP)
        audited = filled.compute(replace(given, flaws=flaws), other.cache)[: len(flaws)]
        assert torch.equal(audited, hidden), "a look at the selections changes nothing"
        assert not flaws.any()


def test_a_look_finds_a_bad_selection_beside_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row whose selection repeats a position is marked, though more rows of padding follow than are looked at."""
    tiny_deepseek("deepseek_v32", tmp_path, num_hidden_layers=1, first_k_dense_replace=0)
    one = built(tmp_path)
    _, step = stepped(one)
    batch = build_batch(plan_of(STEPS[2], tokens_of(4)), CPU)
    count = len(batch.token_ids)
    shape = Padded(count + MOST_ROWS, PAGES * 64, TOP_K, False, 0, step.sharing, False)
    buffer = torch.zeros(shape.size, dtype=torch.int32)
    shape.fill(buffer.numpy(), batch)
    sparse = int((batch.positions >= TOP_K).nonzero()[0])

    def bad(scores: torch.Tensor, rows: Rows, width: int) -> torch.Tensor:
        selected = select(scores, rows, width)
        selected[sparse, 1] = selected[sparse, 0]
        return selected

    monkeypatch.setattr(device_layer, "select", bad)
    flaws = torch.zeros(count, dtype=torch.int32, device=CHIP)
    step.compute(replace(shape.inputs(buffer.to(CHIP)), flaws=flaws), one.cache)
    assert flaws[sparse] & REPEATED
    assert not flaws[torch.arange(count, device=CHIP) != sparse].any()
