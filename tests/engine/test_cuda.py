"""The same engine on a CUDA device: kernels against their definition, logits against the CPU's reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.torchops.attention import VectorisedKernels
from tests.engine.kernels.test_attention import Case
from tests.engine.kit import Lab, base_of, random_overlay, tiny_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("shape", [(1, 5, 3, 0), (4, 1, 2, 1)])
def test_kernels(shape: tuple[int, int, int, int]) -> None:
    case, kernels, reference = Case(shape, torch.float32), VectorisedKernels(), ReferenceKernels()
    cpu = (case.index_query, case.head_weights, case.keys, case.block_table, case.positions)
    scores = kernels.index_scores(*(tensor.cuda() for tensor in cpu)).cpu()
    torch.testing.assert_close(scores, reference.index_scores(*cpu), rtol=1e-4, atol=1e-4)
    wanted = reference.select(case.scores, case.index_top_k)
    selected = kernels.select(case.scores.cuda(), case.index_top_k.cuda()).cpu()
    assert torch.equal(selected.sort(-1).values, wanted.sort(-1).values)
    args = (case.query, case.kv, case.block_table, wanted)
    query, kv, block_table, chosen = (tensor.cuda() for tensor in args)
    out = kernels.attend_selected(query, kv, block_table, chosen, 0.3).cpu()
    torch.testing.assert_close(out, reference.attend_selected(*args, 0.3), rtol=1e-4, atol=1e-4)


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
