"""The trainer's forward is the model's, and its student is the indexer that is served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.kernels.reference.attention import ReferenceKernels
from engine.layers.rope import RotaryTable
from engine.models.gqa.trunk import LayerInputs
from lab.distill.evaluate import held_out
from lab.distill.objective import attention_target, divergence
from lab.distill.sequences import CorpusSplit
from lab.distill.sparse_forward import by_oracle, by_student, by_window, losses
from lab.distill.student import Student
from tests.engine.kit import VOCAB
from tests.engine.models.gqa.plain import PlainLlama
from tests.lab.distill.kit import CPU, INFO, Bench, one_thread, write_corpus


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("model"))


def tokens_of(seed: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def shaken(student: Student) -> Student:
    """Make norms and biases random, too; else a test would not see that one is left out."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in student.parameters.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return student


def inputs_of(bench: Bench, layer: int, tokens: Tensor) -> LayerInputs:
    with torch.no_grad():
        x = bench.trunk.embed(tokens)
        for below in range(layer):
            opened = bench.trunk.open(below, x)
            x = bench.trunk.close(below, x, bench.trunk.attend(opened, slice(None), None))
        return bench.trunk.open(layer, x)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 99), length=st.integers(2, 150))
def test_dense_losses_equal_transformers(bench: Bench, seed: int, length: int) -> None:
    tokens = tokens_of(seed, length)
    with torch.no_grad():
        logits = bench.model(tokens.unsqueeze(0)).logits[0]
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    torch.testing.assert_close(losses(bench.trunk, tokens, None), expected, atol=2e-4, rtol=1e-4)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 99),
    length=st.integers(2, 70),
    top_k=st.integers(1, 80),
    chunk=st.sampled_from([7, 64]),
)
def test_sparse_losses_equal_a_llama_written_out(
    bench: Bench, seed: int, length: int, top_k: int, chunk: int
) -> None:
    student = shaken(bench.student())
    indexer = {name: parameter.detach() for name, parameter in student.parameters.items()}
    plain = PlainLlama(bench.model.state_dict(), bench.model.config, indexer)
    tokens = tokens_of(seed, length)
    logits, masks, scores = plain.forward(tokens.tolist(), top_k, INFO.num_heads, INFO.rope_dim)
    assume(plain.clear(scores, top_k))
    expected = F.cross_entropy(logits[:-1], tokens[1:], reduction="none").float()
    select = by_student(student, top_k)
    seen: list[list[Tensor]] = [[] for _ in masks]

    def watched(layer: int, inputs: LayerInputs, rows: Tensor) -> Tensor:
        seen[layer].append(select(layer, inputs, rows))
        return seen[layer][-1]

    actual = losses(bench.trunk, tokens, watched, chunk)
    for layer, mask in enumerate(masks):
        wide = [F.pad(part, (0, length - part.shape[1])) for part in seen[layer]]
        assert torch.equal(torch.cat(wide), mask)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_students_scores_are_those_of_the_serving_indexer(bench: Bench, layer: int) -> None:
    student, inputs = shaken(bench.student()), inputs_of(bench, layer, tokens_of(3, 64))
    rows = torch.tensor([0, 9, 40, 63])
    with torch.no_grad():
        scores = student.scores(layer, inputs, rows).masked_fill(~inputs.visible(rows), -torch.inf)
    at = f"model.layers.{layer}.self_attn.indexer."
    own = {name.removeprefix(at): p.detach() for name, p in student.parameters.items()}
    served = LightningIndexer(
        IndexerWeights(
            wq=own["wq.weight"], wk=own["wk.weight"], k_norm_weight=own["k_norm.weight"],
            k_norm_bias=own["k_norm.bias"], weights_proj=own["weights_proj.weight"],
        ),
        INFO.num_heads,
    )  # fmt: skip
    rotary = RotaryTable(INFO.rope_dim, bench.trunk.config.rope_theta, 64)
    plane = served.keys(inputs.hidden, rotary.at(torch.arange(64))).unsqueeze(0)  # one page
    queries = served.queries(inputs.hidden[rows], rotary.at(rows))
    expected = ReferenceKernels().index_scores(
        queries.query.unsqueeze(0), queries.head_weights.unsqueeze(0), plane, torch.tensor([[0]]), rows.unsqueeze(0)
    )  # fmt: skip
    torch.testing.assert_close(scores, expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("support", ["causal", "selected"])
def test_gradients_reach_every_indexer_parameter_of_the_layer_and_nothing_else(
    bench: Bench, support: str
) -> None:
    student, rows = bench.student(), torch.tensor([20, 40, 63])
    with torch.no_grad():
        x = bench.trunk.embed(tokens_of(1, 64))
    for weight in bench.weights.values():
        weight.requires_grad_()
    try:
        inputs = bench.trunk.open(0, x)
        assert inputs.hidden.requires_grad  # otherwise this test would say nothing
        allowed = inputs.visible(rows)
        target = attention_target(inputs.query[rows], inputs.keys, allowed, bench.trunk.scale)
        if support == "selected":
            allowed = by_student(student, 8)(0, inputs, rows)
        divergence(target, student.scores(0, inputs, rows), allowed).mean().backward()
        assert [name for name, weight in bench.weights.items() if weight.grad is not None] == []
    finally:
        for weight in bench.weights.values():
            weight.requires_grad_(False)
            weight.grad = None
    for name, parameter in student.parameters.items():
        moved = parameter.grad is not None and bool((parameter.grad != 0).any())
        assert moved == name.startswith("model.layers.0."), name


def test_a_window_is_the_last_tokens_and_the_first_four(bench: Bench) -> None:
    inputs = inputs_of(bench, 0, tokens_of(0, 40))
    mask = by_window(12)(0, inputs, torch.tensor([5, 30]))
    assert mask[0].nonzero().flatten().tolist() == list(range(6))
    assert mask[1].nonzero().flatten().tolist() == [0, 1, 2, 3, *range(23, 31)]


def test_no_selection_captures_more_than_the_oracle(bench: Bench) -> None:
    inputs, rows = inputs_of(bench, 1, tokens_of(2, 64)), torch.arange(64)
    target = attention_target(inputs.query, inputs.keys, inputs.visible(rows), bench.trunk.scale)
    best = (target * by_oracle(bench.trunk, 8)(1, inputs, rows)).sum(-1)
    for other in (by_window(8), by_student(bench.student(), 8)):
        assert bool(((target * other(1, inputs, rows)).sum(-1) <= best + 1e-6).all())


def test_the_evaluation_is_a_mean_over_tokens_by_kind(bench: Bench, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, heldout=(150, 200, 60, 100))
    split = CorpusSplit.open(folder, "heldout", VOCAB)
    table = held_out(
        bench.trunk, bench.student(), split, CPU, index_top_k=(8, 500), per_kind=2, baselines=True, beyond=50
    )
    prose, chat, short, chat2 = split.sequences
    dense = {s: losses(bench.trunk, split.tokens(s, 999, CPU), None)[49:] for s in (prose, chat, chat2)}
    assert short.kind == "prose"  # and too short to count
    assert table["dense"]["prose"] == pytest.approx(float(dense[prose].mean()))
    assert table["dense"]["chat"] == pytest.approx(float(torch.cat((dense[chat], dense[chat2])).mean()))
    assert table["dense"]["all"] == pytest.approx(float(torch.cat(list(dense.values())).mean()))
    assert table["sparse 500"]["all"] == pytest.approx(table["dense"]["all"], abs=1e-4)
    assert abs(table["window 8"]["all"] - table["dense"]["all"]) > 1e-3
    assert held_out(bench.trunk, bench.student(), split, CPU, beyond=101) == {}
