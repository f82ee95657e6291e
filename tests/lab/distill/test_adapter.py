"""The sparse adapter: it does not change dense rows, brings sparse rows nearer to dense, and serves as trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.overlay import overlay_shapes, read_overlay, write_overlay
from engine.errors import CheckpointError, ConfigError
from lab.corpus.manifest import SequenceInfo
from lab.distill.__main__ import app
from lab.distill.adaptation import adapt
from lab.distill.adapter import Adapter
from lab.distill.recipe import Recipe
from lab.distill.sequences import CorpusSplit, answer_rows
from lab.distill.sparse_forward import by_student, final_rows, losses
from lab.distill.train import StepLog, Trainer
from lab.tool import start
from tests.engine.kit import VOCAB
from tests.engine.models.gqa.plain import PlainLlama
from tests.lab.distill.kit import CPU, INFO, Bench, one_thread, write_corpus

RECIPE = Recipe(
    max_length=96, min_length=80, rows=32, first_row=8, sequences_per_step=2, warmup_steps=0, sparse_steps=0,
    adapt_steps=40, adapter_rank=4, adapter_learning_rate=1e-2, ramp_steps=3, sparse_top_k=(16,), report_top_k=16,
)  # fmt: skip
TOKENS = torch.randint(0, VOCAB, (90,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def adapter(bench: Bench, *, shaken: bool = False) -> Adapter:
    made = Adapter(bench.trunk.config, 4, CPU, 0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters.values() if shaken else ():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def trainer(bench: Bench, corpus: Path, folder: Path, recipe: Recipe = RECIPE) -> Trainer:
    folder.mkdir(exist_ok=True)
    split = CorpusSplit.open(corpus, "train", VOCAB)
    return Trainer(bench.trunk, bench.student(), split, recipe, folder, "base", adapter=adapter(bench))


def log_of(folder: Path) -> list[StepLog]:
    return [
        msgspec.json.decode(line, type=StepLog) for line in (folder / "log.jsonl").read_bytes().splitlines()
    ]


def test_untrained_it_changes_nothing_and_trained_nothing_before_top_k(bench: Bench) -> None:
    student = bench.student()
    plain = losses(bench.trunk, TOKENS, by_student(student, 16))
    new = losses(bench.trunk, TOKENS, by_student(student, 16), adapter=adapter(bench), index_top_k=16)
    assert torch.equal(plain, new)
    changed = losses(
        bench.trunk, TOKENS, by_student(student, 16), adapter=adapter(bench, shaken=True), index_top_k=16
    )
    assert torch.equal(plain[:16], changed[:16])
    assert not torch.allclose(plain[16:], changed[16:], atol=1e-3)


@pytest.mark.parametrize("top_k", [1, 16, 89])
def test_adapted_losses_equal_a_llama_written_out(bench: Bench, top_k: int) -> None:
    student, corrections = bench.student(), adapter(bench, shaken=True)
    trained = {name: p.detach() for name, p in (student.parameters | corrections.parameters).items()}
    plain = PlainLlama(bench.model.state_dict(), bench.model.config, trained)
    logits, masks, _ = plain.forward(TOKENS.tolist(), top_k, INFO.num_heads, INFO.rope_dim)
    given = iter(masks)
    current: dict[int, Tensor] = {}

    def select(layer: int, inputs: object, rows: Tensor) -> Tensor:
        if layer not in current:
            current[layer] = next(given)
        return current[layer][rows]

    own = losses(bench.trunk, TOKENS, select, adapter=corrections, index_top_k=top_k)
    expected = torch.nn.functional.cross_entropy(logits[:-1], TOKENS[1:], reduction="none")
    assert torch.allclose(own.double(), expected, atol=1e-4)


def test_training_brings_predictions_nearer_to_dense_and_leaves_the_model_alone(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in bench.weights.items()}
    run = trainer(bench, corpus, tmp_path)

    run.run()
    log = log_of(tmp_path)
    assert [entry.stage for entry in log] == ["adapt"] * 40
    early, late = (sum(e.distance or 0 for e in part) / 5 for part in (log[:5], log[-5:]))
    assert late < 0.9 * early
    assert all(torch.equal(before[name], weight) for name, weight in bench.weights.items())


def test_its_gradient_is_the_distances_and_the_indexers_their_own(bench: Bench) -> None:
    student, corrections = bench.student(), adapter(bench, shaken=True)
    rows, answers = torch.arange(20, 80, 3), torch.tensor([50, 51])
    made = adapt(bench.trunk, student, corrections, TOKENS[:88], rows, 16, 1.0, answers)
    of_indexers = {name: p.grad.clone() for name, p in student.parameters.items() if p.grad is not None}
    assert of_indexers.keys() == student.parameters.keys()
    assert all(p.grad is None for p in corrections.parameters.values())
    torch.autograd.backward(made.distance + made.answers)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in corrections.parameters.values())
    assert all(torch.equal(of_indexers[name], student.parameters[name].grad) for name in of_indexers)  # type: ignore[arg-type]


def test_the_distance_and_the_answers_loss_are_their_formulas(bench: Bench) -> None:
    student, corrections = bench.student(), adapter(bench, shaken=True)
    tokens, rows, answers = TOKENS[:88], torch.arange(20, 80, 7), torch.tensor([40, 41, 60])
    made = adapt(bench.trunk, student, corrections, tokens, rows, 16, 1.0, answers)
    with torch.no_grad():
        dense = bench.trunk.logits(final_rows(bench.trunk, tokens, None)).double().softmax(-1)
        sparse = final_rows(bench.trunk, tokens, by_student(student, 16), adapter=corrections, index_top_k=16)
        other = bench.trunk.logits(sparse).double().softmax(-1)
    expected = (dense * (dense / other).log()).sum(-1)[rows].mean()
    assert float(made.distance.detach()) == pytest.approx(float(expected), rel=1e-4)
    told = -other[answers, tokens[answers + 1]].log().mean()
    assert float(made.answers.detach()) == pytest.approx(float(told), rel=1e-4)


def test_a_stopped_run_goes_on_to_the_bit(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    short = msgspec.structs.replace(RECIPE, adapt_steps=6)
    whole = trainer(bench, corpus, tmp_path / "whole", short)
    whole.run()
    trainer(bench, corpus, tmp_path / "parts", short).run(until=3)
    second = trainer(bench, corpus, tmp_path / "parts", short)
    assert second.resume()
    second.run()
    ours, theirs = whole.parameters(), second.parameters()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_recipe_that_adapts_needs_an_adapter(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    split = CorpusSplit.open(corpus, "train", VOCAB)
    with pytest.raises(ConfigError, match="adapt_steps, but there is no adapter"):
        Trainer(bench.trunk, bench.student(), split, RECIPE, tmp_path)


def test_the_rows_of_answers_predict_their_tokens() -> None:
    sequence = SequenceInfo(start=0, length=50, kind="chat", focus=((10, 13), (48, 50)))
    assert answer_rows(sequence, 50).tolist() == [9, 10, 11, 47, 48]
    assert answer_rows(sequence, 12).tolist() == [9, 10]


def test_the_command_trains_one_and_goes_on_only_with_it(
    bench: Bench, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: str, recipe: dict[str, int], *more: str) -> int:
        small = {"max_length": 96, "min_length": 80, "rows": 16, "first_row": 8, "sequences_per_step": 1}
        arguments = [
            str(bench.folder), "--corpus", str(corpus), "--out", str(tmp_path / out), "--heads", "3", "--dim", "16",
            "--rope", "8", "--device", "cpu", "--recipe", json.dumps(small | recipe), *more,
        ]  # fmt: skip
        return start(app, "distill", arguments)

    stages = {"warmup_steps": 1, "sparse_steps": 1, "adapt_steps": 2, "adapter_rank": 4}
    assert run("a", stages) == 0
    made = tmp_path / "a" / "indexer.safetensors"
    assert read_overlay(made, bench.source).info.adapter_rank == 4
    begun = ("--start-from", str(made))
    assert run("b", {"warmup_steps": 0, "sparse_steps": 0, "adapt_steps": 1, "adapter_rank": 4}, *begun) == 0
    capsys.readouterr()
    assert run("c", {"warmup_steps": 1, "sparse_steps": 0}, *begun) == 1
    assert "has an adapter, which suits its indexers only" in capsys.readouterr().err
    assert run("e", {"warmup_steps": 1, "sparse_steps": 0}, *begun, "--drop-adapter") == 0
    assert read_overlay(tmp_path / "e" / "indexer.safetensors", bench.source).info.adapter_rank == 0
    assert run("d", {"warmup_steps": 0, "sparse_steps": 0, "adapt_steps": 1, "adapter_rank": 8}, *begun) == 1
    assert "has an adapter of rank 4" in capsys.readouterr().err


def test_an_overlay_has_all_of_its_adapter(bench: Bench, tmp_path: Path) -> None:
    info = msgspec.structs.replace(INFO, adapter_rank=4)
    tensors = {name: torch.ones(shape) for name, shape in overlay_shapes(info, bench.source).items()}
    path = tmp_path / "o.safetensors"
    write_overlay(path, tensors, info, "", bench.source)
    assert read_overlay(path, bench.source).info.adapter_rank == 4
    name = "model.layers.1.self_attn.sparse_adapter.o.b"
    with pytest.raises(CheckpointError, match=f"lacks tensor {name}; .* needs a whole adapter"):
        write_overlay(path, {k: v for k, v in tensors.items() if k != name}, info, "", bench.source)
    with pytest.raises(CheckpointError, match=r"o\.b of shape \[2, 4\], expected \[48, 4\]"):
        write_overlay(path, tensors | {name: torch.ones(2, 4)}, info, "", bench.source)
    save_file(load_file(path), path, {})
    with pytest.raises(CheckpointError, match="an overlay has"):
        read_overlay(path, bench.source)
