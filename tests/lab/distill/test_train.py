"""Training runs: they learn, resume bit for bit, refuse other runs' checkpoints, and end in an overlay that serves."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from engine.errors import ConfigError
from lab.distill.__main__ import app
from lab.distill.recipe import Recipe, read_recipe
from lab.distill.sequences import CorpusSplit
from lab.distill.train import StepLog, Trainer
from lab.tool import start
from tests.engine.kit import VOCAB, Lab
from tests.lab.distill.kit import INFO, Bench, one_thread, write_corpus

RECIPE = Recipe(
    max_length=96, min_length=80, rows=16, first_row=8, sequences_per_step=2, warmup_steps=35, sparse_steps=15,
    learning_rate=1e-2, ramp_steps=3, sparse_top_k=(8, 16), report_top_k=12,
)  # fmt: skip
SHORT = msgspec.structs.replace(RECIPE, warmup_steps=4, sparse_steps=3)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with one_thread():
        yield Bench(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def trainer(bench: Bench, corpus: Path, folder: Path, recipe: Recipe = SHORT, base: str = "base") -> Trainer:
    folder.mkdir(exist_ok=True)
    split = CorpusSplit.open(corpus, "train", VOCAB)
    return Trainer(bench.trunk, bench.student(recipe.seed), split, recipe, folder, base)


def read_log(folder: Path) -> list[StepLog]:
    lines = (folder / "log.jsonl").read_bytes().splitlines()
    return [msgspec.json.decode(line, type=StepLog) for line in lines]


def same(a: Trainer, b: Trainer) -> bool:
    ours, theirs = a.student.parameters, b.student.parameters
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fifty_steps_lower_the_divergence_and_raise_the_recall_of_every_layer(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in bench.weights.items()}
    trainer(bench, corpus, tmp_path, RECIPE).run()
    log = read_log(tmp_path)
    assert [entry.step for entry in log] == list(range(50))
    assert [entry.stage for entry in log] == ["dense"] * 35 + ["sparse"] * 15
    assert [entry.rate for entry in log] == [RECIPE.rate(step) for step in range(50)]
    for layer in range(3):
        early_loss, late_loss = (sum(e.loss[layer] for e in part) / 5 for part in (log[:5], log[30:35]))
        early_recall, late_recall = (sum(e.recall[layer] for e in part) / 5 for part in (log[:5], log[-5:]))
        assert late_loss < 0.85 * early_loss
        assert late_recall > early_recall + 0.02
    assert all(torch.equal(before[name], weight) for name, weight in bench.weights.items())


def test_the_sparse_stage_may_read_everything_in_the_layers_before(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    """The first layer's loss is the same; a later layer sees what dense attention gives it, as at a top_k of everything."""
    base = msgspec.structs.replace(
        SHORT, warmup_steps=0, sparse_steps=1, max_length=96, sparse_support="causal"
    )
    logs = {}
    changes: dict[str, dict[str, Any]] = {
        "selected": {}, "dense": {"sparse_forward": "dense"}, "everything": {"sparse_top_k": (96,)},
    }  # fmt: skip
    for name, change in changes.items():
        trainer(bench, corpus, tmp_path / name, msgspec.structs.replace(base, **change)).run()
        (logs[name],) = read_log(tmp_path / name)
    assert logs["dense"].loss[0] == logs["selected"].loss[0]
    assert abs(logs["dense"].loss[2] - logs["selected"].loss[2]) > 1e-4
    assert logs["dense"].loss == pytest.approx(logs["everything"].loss, rel=1e-5)


def test_a_run_that_was_stopped_and_resumed_is_the_run_that_was_not(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    """The run is stopped once in each stage. Log lines after the last checkpoint stand for a run that was killed."""
    whole = trainer(bench, corpus, tmp_path / "whole")
    whole.run(save_every=100)
    folder = tmp_path / "parts"
    for until in (2, 5):
        part = trainer(bench, corpus, folder)
        assert part.resume() == (until == 5)
        part.run(until=until)
        assert part.step == until
        assert not same(part, whole)
        with (folder / "log.jsonl").open("ab") as log:  # steps of a run that was killed, the last one cut
            log.write(msgspec.json.encode(msgspec.structs.replace(read_log(folder)[-1], step=until)) + b"\n{")
    last = trainer(bench, corpus, folder)
    assert last.resume()
    last.run()
    assert same(last, whole)
    assert [entry.step for entry in read_log(folder)] == list(range(7))
    for ours, theirs in zip(read_log(folder), read_log(tmp_path / "whole"), strict=True):
        assert (ours.loss, ours.recall, ours.rate) == (theirs.loss, theirs.recall, theirs.rate)


def test_a_log_without_a_checkpoint_starts_anew(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    trainer(bench, corpus, tmp_path).run(until=2)
    (tmp_path / "checkpoint.pt").unlink()
    again = trainer(bench, corpus, tmp_path)
    assert not again.resume()
    again.run(until=1)
    assert [entry.step for entry in read_log(tmp_path)] == [0]


def test_stop_ends_after_the_step_and_saves(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    first = trainer(bench, corpus, tmp_path)
    first.run(lambda log: first.stop() if log.step == 1 else None)
    assert first.step == 2
    second = trainer(bench, corpus, tmp_path)
    assert second.resume()
    assert second.step == 2
    assert same(first, second)


def test_a_checkpoint_of_something_else_is_refused(bench: Bench, corpus: Path, tmp_path: Path) -> None:
    trainer(bench, corpus, tmp_path / "run").run(until=1)
    other = write_corpus(tmp_path / "corpus", seed=1)
    split = CorpusSplit.open(corpus, "train", VOCAB)
    smaller = bench.student(info=msgspec.structs.replace(INFO, num_heads=2))
    recipe = msgspec.structs.replace(SHORT, rows=17)
    for what, resumed in {
        "recipe": trainer(bench, corpus, tmp_path / "run", recipe),
        "corpus": trainer(bench, other, tmp_path / "run"),
        "base model": trainer(bench, corpus, tmp_path / "run", base="other"),
        "start": Trainer(
            bench.trunk,
            bench.student(),
            CorpusSplit.open(corpus, "train", VOCAB),
            SHORT,
            tmp_path / "run",
            "base",
            "an overlay",
        ),
        "indexer": Trainer(bench.trunk, smaller, split, SHORT, tmp_path / "run", "base"),
    }.items():
        with pytest.raises(ConfigError, match=f"was made with another {what}; use another folder"):
            resumed.resume()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no zip at all"])
def test_a_damaged_checkpoint_is_refused(bench: Bench, corpus: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ConfigError, match="is not a checkpoint of this trainer"):
        trainer(bench, corpus, tmp_path).resume()


def test_a_loss_that_is_not_finite_ends_the_run_before_it_spoils_the_parameters(
    bench: Bench, corpus: Path, tmp_path: Path
) -> None:
    run = trainer(bench, corpus, tmp_path)
    name = next(iter(run.student.parameters))
    with torch.no_grad():
        run.student.parameters[name].fill_(float("nan"))
    with pytest.raises(ConfigError, match="the loss of step 0 is not finite"):
        run.run()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_rate_ramps_up_and_falls_in_each_stage() -> None:
    rates = [RECIPE.rate(step) for step in range(50)]
    for part, peak in ((rates[:35], RECIPE.learning_rate), (rates[35:], RECIPE.sparse_learning_rate)):
        assert part[:3] == pytest.approx([peak / 3, peak * 2 / 3, peak])
        assert part[3:] == sorted(part[3:], reverse=True)
        assert 0.1 * peak < part[-1] < 0.2 * peak


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "the recipe '{' is not JSON"),
        ("[]", "the recipe cannot be used: Expected `object`, got `array`"),
        ('{"warmup": 5}', "unknown field `warmup`; there are seed, max_length"),
        ('{"rows": 0}', "the recipe cannot be used: rows: Expected `int` >= 1"),
        ('{"rows": "9"}', "the recipe cannot be used: rows: Expected `int`, got `str`"),
        ('{"sparse_top_k": []}', "the recipe cannot be used: sparse_top_k: Expected `array` of length >= 1"),
        ('{"learning_rate": -1}', "the recipe cannot be used: learning_rate: Expected `float` > 0.0"),
        ('{"first_row": 512}', r"first_row \(512\) must be below min_length \(512\)"),
        ('{"max_length": 100}', r"at most max_length \(100\)"),
        ('{"warmup_steps": 0, "sparse_steps": 0}', "adapt_steps are all 0"),
    ],
)
def test_a_wrong_recipe_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_recipe(text)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_what_was_written_and_defaults() -> None:
    assert read_recipe('{"rows": 7, "sparse_top_k": [3]}') == Recipe(rows=7, sparse_top_k=(3,))


FLAGS = ("--heads=3", "--dim=16", "--rope=8", "--default-top-k=16", "--device=cpu", "--dtype=float32")


def command(bench: Bench, corpus: Path, out: Path, *more: str, recipe: Recipe = SHORT) -> list[str]:
    text = msgspec.json.encode(recipe).decode()
    return [
        str(bench.folder),
        f"--corpus={corpus}",
        f"--out={out}",
        *FLAGS,
        f"--recipe={text}",
        *more,
    ]


def test_the_command_leaves_an_overlay_that_the_engine_serves(
    bench: Bench, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lab.distill.run.LEAST_TOP_K", 32)
    out = tmp_path / "out"
    assert start(app, "distill", command(bench, corpus, out, "--until=3", "--evaluate-every=2")) == 0
    assert "step 1 of 7  dense  KL " in capsys.readouterr().out
    assert start(app, "distill", command(bench, corpus, out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("resuming at step 3 of 7\nstep 4 of 7  dense  KL ")
    assert "step 7 of 7  sparse  KL " in printed
    assert f"--overlay {out / 'indexer.safetensors'}" in printed
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt", "evaluation.json", "indexer.safetensors", "log.jsonl", "loss.png",
    ]  # fmt: skip
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "evaluation.json").read_text())
    assert list(figures) == ["dense"] + [
        f"{name} {k}" for k in (16, 32) for name in ("sparse", "oracle", "window")
    ]
    lab = Lab(bench.folder, out / "indexer.safetensors")
    info = lab.built.ready.model.indexer
    assert info is not None
    assert (info.num_heads, info.head_dim, info.rope_dim, info.default_index_top_k) == (3, 16, 8, 16)
    run = lab.run()
    run.submit("a", list(range(60)), max_tokens=5, index_top_k=16)
    run.finish()
    assert run.ends["a"].finish_reason == "length"
    assert len(run.selected[(16, *range(60))][0]) == 16


def test_a_run_goes_on_from_an_overlay(
    bench: Bench, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert start(app, "distill", command(bench, corpus, first, "--evaluate-kind=0")) == 0
    overlay = first / "indexer.safetensors"
    more = (f"--start-from={overlay}", "--evaluate-kind=0")
    assert start(app, "distill", command(bench, corpus, second, *more, "--until=0")) == 0
    assert load_file(second / "indexer.safetensors").keys() == load_file(overlay).keys()
    for name, tensor in load_file(second / "indexer.safetensors").items():
        assert torch.equal(tensor, load_file(overlay)[name])
    header = safe_open(second / "indexer.safetensors", "pt").metadata()
    made = json.loads(header["recipe"])
    assert made["steps"] == 0
    assert made["start"] == json.loads(safe_open(overlay, "pt").metadata()["recipe"])
    assert made["start"]["steps"] == SHORT.total_steps
    capsys.readouterr()
    assert start(app, "distill", command(bench, corpus, tmp_path / "third", *more, "--heads=4")) == 1
    assert "--heads is 4, but" in capsys.readouterr().err


def test_a_signal_stops_the_command_and_the_same_command_goes_on(
    bench: Bench, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    step = Trainer._step

    def interrupted(self: Trainer, data: object) -> StepLog:
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, data)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "_step", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    assert start(app, "distill", command(bench, corpus, tmp_path)) == 130
    assert "stopped at step 3; the same command goes on from there" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "indexer.safetensors").exists()
    assert start(app, "distill", command(bench, corpus, tmp_path, "--until=4")) == 0
    printed = capsys.readouterr().out
    assert "resuming at step 3 of 7" in printed
    assert (
        "nothing evaluated: that takes held-out sequences, and room in the model, of 2048 tokens" in printed
    )
    assert (
        start(
            app,
            "distill",
            command(bench, corpus, tmp_path, "--until=5", "--evaluate-kind=0", "--evaluate-every=1"),
        )
        == 0
    )
    assert "above dense" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--recipe={"], "error: the recipe '{' is not JSON"),
        (['--recipe={"rowz": 1}'], "error: the recipe cannot be used: Object contains unknown field"),
        (["--rope=18"], "error: --rope is 18; expected an even number up to --dim (16)"),
        (["--rope=7"], "error: --rope is 7; expected an even number up to --dim (16)"),
        (["--device=tpu"], "error: device 'tpu'"),
        (["--corpus=nowhere"], "error: nowhere holds no corpus; build one: dsa corpus --out nowhere"),
    ],
)
def test_errors_of_the_command_are_one_sentence(
    bench: Bench, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], sentence: str
) -> None:  # fmt: skip
    assert start(app, "distill", command(bench, corpus, tmp_path / "out", *more)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "out").exists()
