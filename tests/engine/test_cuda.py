"""The same engine on a CUDA device: kernels against their definition, logits against the CPU's reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.kernels.torchops.attention import VectorisedKernels
from engine.models.gqa.model import GqaModel
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.protocol import SamplingParams, Submit
from engine.step.build import Built, build
from engine.step.core import EngineCore, StepRunner
from lab.doctor.tiles import (
    CASES,
    TOLERANCE,
    HeadDims,
    TileCase,
    TileShape,
    check_fp8,
    check_latents,
    check_tile,
)
from tests.engine.kit import VOCAB, Lab, base_of, random_overlay, tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "dims"), CASES)
def test_kernels(dtype: torch.dtype, shape: TileShape, dims: HeadDims) -> None:
    for check in (check_tile, check_latents, check_fp8):
        check(VectorisedKernels(), TileCase(shape, dtype, dims), torch.device("cuda"))


@pytest.mark.parametrize("index_top_k", [None, 32])
def test_logits_equal_those_of_the_cpu(tmp_path: Path, index_top_k: int | None) -> None:
    tiny_checkpoint(tmp_path)
    overlay = random_overlay(tmp_path / "indexer.safetensors", base_of(tmp_path))
    runs = []
    for device in ("cpu", "cuda"):
        run = Lab(tmp_path, overlay, device=device).run(budget=70, running=4)
        for name, length in (("a", 150), ("b", 65), ("c", 1)):
            run.submit(name, [(7 * i + len(name)) % 97 for i in range(length)], 4, index_top_k)
        runs.append(run.finish())
    cpu, cuda = runs
    for name in "abc":
        assert cuda.tokens[name] == cpu.tokens[name]
        last = max(cpu.rows[name])
        expected = cpu.lab.logits(cpu.rows[name][last][-1].unsqueeze(0))
        got = cuda.lab.logits(cuda.rows[name][last][-1].unsqueeze(0)).cpu()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def generate(
    built: Built,
    prompts: dict[str, list[int]],
    budget: int,
    pages: int | None = None,
    runner: StepRunner | None = None,
    **sampling: Any,
) -> dict[str, list[int]]:
    """What each prompt gets, all in company: sparse ones, and those named "dense" without a selection."""
    scheduler = Scheduler(
        pages or built.ready.capacity.num_pages,
        token_budget=budget,
        max_running=8,
        max_model_len=640,
        prefix_caching=False,
    )
    core = EngineCore(scheduler, runner or built.ahead or built.runner, Meter(built.costs), sparse=True)
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=12, seed=len(prompt), **{"temperature": 0.0, **sampling})
        top_k = None if name.startswith("dense") else 32
        core.submit(
            Submit(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, index_top_k=top_k)
        )
    told: dict[str, list[int]] = {name: [] for name in prompts}
    while core.has_work:
        output = core.step()
        assert output is not None
        for delta in output.deltas:
            assert delta.error is None
            told[delta.request_id].extend(delta.token_ids)
    return told


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Float32: two orders of one sum then differ by less than any two logits here."""
    folder = tmp_path_factory.mktemp("device")
    tiny_checkpoint(folder)
    overlay = random_overlay(folder / "indexer.safetensors", base_of(folder))
    return build(
        EngineConfig(
            weights=str(folder), overlay=str(overlay), device="cuda", dtype="float32", kernels="triton",
            kv_cache_bytes=64 << 20, max_running=8,
        )
    )  # fmt: skip


PROMPTS = {
    f"{'dense' if number % 3 == 0 else 'sparse'} {number}": [(7 * i + 13 * number) % VOCAB for i in range(20 + 31 * number)]
    for number in range(8)
}  # fmt: skip


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 0.7},
        {"frequency_penalty": 0.5},
        {"logprobs": 2},
    ],
)
def test_neither_graphs_nor_company_nor_chunks_change_a_token(built: Built, sampling: dict[str, Any]) -> None:
    model = built.runner._model
    assert isinstance(model, GqaModel)
    assert model.device_step is not None
    together = generate(built, PROMPTS, 512, **sampling)
    graphs = model.device_step._graphs
    assert graphs is not None
    model.device_step._graphs = None
    try:
        assert generate(built, PROMPTS, 512, **sampling) == together
    finally:
        model.device_step._graphs = graphs
    assert generate(built, PROMPTS, 16, **sampling) == together
    assert generate(built, PROMPTS, 512, pages=6, **sampling) == together, "preempted"
    assert generate(built, PROMPTS, 512, runner=built.runner, **sampling) == together, "step by step"
    for name, prompt in PROMPTS.items():
        assert generate(built, {name: prompt}, 512, **sampling)[name] == together[name]


def test_rows_that_fill_a_graph_write_nothing(built: Built) -> None:
    """Three requests in a graph of four rows: no more pages are written than these need."""
    cache = built.cache
    cache.wipe(range(cache.num_pages))
    names = list(PROMPTS)[:3]
    generate(built, {name: PROMPTS[name] for name in names}, 512)
    used = sum(-(-(len(PROMPTS[name]) + 12) // 64) for name in names)
    for i in range(3):
        written = cache.plane(i, "kv").flatten(1).any(1)
        assert int(written.sum()) <= used
