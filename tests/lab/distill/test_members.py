"""For every member of the llama family the trainer computes what the server computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint.eight_bit import EightBitFile
from engine.checkpoint.safetensors import SafetensorsFile
from engine.checkpoint.source import open_source
from engine.errors import ConfigError
from engine.models.gqa.trunk import LayerInputs
from lab.distill.adapter import Adapter
from lab.distill.base import open_trunk
from lab.distill.run import DistillPlan, run
from lab.distill.sparse_forward import by_student, losses
from tests.engine.kit import Lab
from tests.engine.models.gqa.plain import PlainLlama
from tests.engine.models.gqa.test_members import DENSE, MEMBERS, WINDOW, WINDOWS, oracle, tokens_of
from tests.engine.models.mla.kit import tiny_deepseek
from tests.lab.distill.kit import CPU, INFO, Bench, one_thread, write_corpus


@pytest.mark.parametrize("name", MEMBERS)
def test_losses_are_those_of_transformers_and_of_attention_over_the_same_sets(
    name: str, tmp_path: Path
) -> None:
    bench = Bench(tmp_path, **MEMBERS[name])
    tokens = torch.tensor(tokens_of(3, 90))
    expected = F.cross_entropy(oracle(bench.model, tokens.tolist())[:-1], tokens[1:], reduction="none")
    torch.testing.assert_close(losses(bench.trunk, tokens, None), expected, atol=2e-4, rtol=1e-4)

    student, seen = bench.student(), [[] for _ in range(3)]  # type: ignore[var-annotated]
    indexer = {name: parameter.detach() for name, parameter in student.parameters.items()}
    plain = PlainLlama(bench.model.state_dict(), bench.model.config, indexer)
    select = by_student(student, 16)

    def watched(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        chosen = select(layer, inputs, rows)
        seen[layer].append(chosen)
        return chosen

    actual = losses(bench.trunk, tokens, watched, 64)
    given = [torch.cat([F.pad(part, (0, len(tokens) - part.shape[1])) for part in parts]) for parts in seen]
    logits, masks, _ = plain.forward(tokens.tolist(), 16, INFO.num_heads, INFO.rope_dim, given=given)
    for mine, theirs in zip(given, masks, strict=True):
        assert torch.equal(mine, theirs)  # nothing outside a window was selected
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").float()
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in MEMBERS if not name.startswith("llama")])
def test_what_two_steps_and_one_of_the_adapter_leave_is_served(name: str, tmp_path: Path) -> None:
    bench, out = Bench(tmp_path / "model", **MEMBERS[name]), tmp_path / "out"
    corpus = write_corpus(tmp_path / "corpus")
    recipe = {
        "max_length": 96, "min_length": 80, "rows": 16, "first_row": 8, "sequences_per_step": 1,
        "warmup_steps": 1, "sparse_steps": 1, "adapt_steps": 1, "adapter_rank": 4, "sparse_top_k": [16],
    }  # fmt: skip
    with one_thread():
        plan = DistillPlan(
            weights=bench.folder, corpus=corpus, out=out, heads=3, dim=16, rope=8, device="cpu", evaluate_kind=0,
            recipe=json.dumps(recipe),
        )  # fmt: skip
        assert run(plan) == 0
    file = EightBitFile(SafetensorsFile(out / "indexer.safetensors"))
    served = Lab(bench.folder, out / "indexer.safetensors").run(budget=50)
    served.submit("a", tokens_of(0, 120), 3, index_top_k=16)
    served.finish()
    overlay = {name: file.read(name, torch.float32) for name in file.names()}
    assert any(bool(tensor.any()) for name, tensor in overlay.items() if name.endswith("qkv.b"))
    plain = PlainLlama(bench.model.state_dict(), bench.model.config, overlay)
    masks = served.masks("a", 16, layers=3)
    logits, _, _ = plain.forward(served.tokens["a"], 16, 3, 8, given=masks)
    assert served.error("a", logits) < DENSE


def test_a_family_without_a_trunk_is_refused_in_a_sentence(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path)
    with pytest.raises(
        ConfigError, match="is a deepseek_v32 model; an indexer is trained for models with grouped"
    ):
        open_trunk(open_source(tmp_path), torch.float32, CPU)


def test_rows_are_corrected_only_in_layers_where_they_select(tmp_path: Path) -> None:
    """Layer 0 has no window and selects; the windows of the others fit within top_k, so they are read whole."""
    top_k = WINDOW + 8
    bench = Bench(tmp_path, kind="qwen2", **WINDOWS, max_window_layers=1)
    student, tokens = bench.student(), torch.tensor(tokens_of(3, 90))
    adapter = Adapter(bench.trunk.config, 4, CPU, 0)
    generator = torch.Generator().manual_seed(1)
    adapter.load(
        {name: 0.2 * torch.randn(p.shape, generator=generator) for name, p in adapter.parameters.items()}
    )
    trained = {name: p.detach() for name, p in (student.parameters | adapter.parameters).items()}
    plain = PlainLlama(bench.model.state_dict(), bench.model.config, trained)
    logits, _, _ = plain.forward(tokens.tolist(), top_k, INFO.num_heads, INFO.rope_dim)
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").float()
    with torch.no_grad():
        actual = losses(bench.trunk, tokens, by_student(student, top_k), 64, adapter, top_k)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
