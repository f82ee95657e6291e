"""`dsa distill`: the plan that it makes from flags, and the errors before training."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from lab.distill.__main__ import app
from lab.distill.recipe import Recipe, read_recipe
from lab.distill.run import DistillPlan
from lab.tool import start
from tests.kit import ROOT


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[DistillPlan]:
    plans: list[DistillPlan] = []

    def run(plan: DistillPlan) -> int:
        plans.append(plan)
        return 0

    monkeypatch.setattr("lab.distill.run.run", run)
    return plans


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a model.gguf"
    path.touch()
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "manifest.json").touch()
    return folder


def test_flags_that_are_not_given_are_the_trainers_defaults(
    planned: list[DistillPlan], model: Path, corpus: Path
) -> None:
    arguments = [str(model), f"--corpus={corpus}", "--out=o"]
    assert start(app, "distill", arguments) == 0
    assert start(app, "distill", [*arguments, "--default-top-k", "9", "--heads=8"]) == 0
    usual = DistillPlan(weights=model, corpus=corpus, out=Path("o"))
    assert planned == [usual, dataclasses.replace(usual, default_top_k=9, heads=8)]


def test_a_missing_corpus_is_a_sentence_with_the_command_that_builds_one(
    planned: list[DistillPlan], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "none"
    assert start(app, "distill", [str(model), "--corpus", str(missing), "--out", "o"]) == 1
    assert capsys.readouterr().err == (
        f"error: {missing} holds no corpus; build one: dsa corpus --out {missing} --model '{model}'\n"
    )
    assert planned == []


def test_a_missing_model_is_a_sentence(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(app, "distill", ["nothing", "--corpus", str(corpus), "--out", "o"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no model 'nothing'")
    assert error.count("\n") == 1


def test_the_help_says_what_a_newcomer_needs() -> None:
    result = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"})
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    words = ("dsa corpus --out DIR", "dsa serve --overlay", "[default: 512]", "goes on from there")
    for expected in (*words, *(name for name in Recipe.__struct_fields__)):
        assert expected in said


_CODER = "qwen2.5-coder-1.5b-instruct"
CARDS = {
    "smollm2-135m-instruct": "README.md",
    _CODER: f"{_CODER}.md",
}
OVERLAYS = ROOT / "engine" / "overlays"


def evaluation_of(name: str) -> dict[str, Any]:
    """What a model's card was written from; it is of the file that is there."""
    evaluation: dict[str, Any] = json.loads(
        (ROOT / "docs" / "overlays" / f"{Path(name).name}.eval.json").read_text()
    )
    digest = hashlib.sha256((OVERLAYS / f"{name}.safetensors").read_bytes()).hexdigest()
    assert evaluation["settings"]["overlay_sha256"] == digest
    return evaluation


@pytest.mark.parametrize("name", CARDS)
def test_a_model_cards_command_is_the_one_that_the_overlays_header_tells_of(
    name: str, planned: list[DistillPlan], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (OVERLAYS / CARDS[name]).read_text()
    with safe_open(OVERLAYS / f"{name}.safetensors", "pt") as file:
        header = file.metadata()
    written = re.findall(rf"dsa distill {re.escape(Path(name).name)} (.*?)\n\n", card, re.DOTALL)
    for folder in re.findall(r"dsa corpus --out (\w+)", card):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").touch()
    monkeypatch.chdir(tmp_path)
    for one in written:
        assert start(app, "distill", [str(model), *shlex.split(one.replace("\\\n", " "))]) == 0
    runs = planned
    for before, after in itertools.pairwise(runs):
        assert after.start_from == before.out / "indexer.safetensors"
    options = runs[-1]
    made = json.loads(header["recipe"])
    assert read_recipe(options.recipe) == read_recipe(json.dumps(made["recipe"]))
    assert (options.until or read_recipe(options.recipe).total_steps) == made["steps"]
    usual = zip((options.heads, options.dim, options.rope), (8, 64, 32), strict=True)
    sizes = [*(given or size for given, size in usual), options.default_top_k]
    assert sizes == [int(header[name]) for name in ("num_heads", "head_dim", "rope_dim", "default_top_k")]
    assert f"| `default_top_k` | {header['default_top_k']} |" in card


def test_the_default_models_card_has_the_figures_of_its_evaluation() -> None:
    name = "smollm2-135m-instruct"
    card, evaluation = (OVERLAYS / CARDS[name]).read_text(), evaluation_of(name)
    for top_k, retention in evaluation["needles"]["retention"].items():
        assert f"| top_k {top_k} | " in card
        assert (
            f"{retention['right']} of {retention['of']} = {retention['right'] / retention['of']:.1%}".replace(
                "%", " %"
            )
            in card
        )
        assert f"+{evaluation['loss']['rows'][top_k]['all']['above_dense']:.4f}" in card
    for top_k in evaluation["needles"]["retention"]:
        row = evaluation["faithful"]["rows"][top_k]["all"]
        low, high = row["agreement_interval"]
        assert (
            f"| top_k {top_k} | {row['agreement']:.1%} [{low:.1%}, {high:.1%}] | {row['kl']:.4f} |".replace(
                "%,", ","
            )
            .replace("%]", "]")
            .replace("%", " %")
            in card
        )
        low, high = row["length_interval"]
        assert f"| {row['length']:.1f} | {row['length_ratio']:.3f} [{low:.3f}, {high:.3f}] |" in card
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (OVERLAYS / picture).is_file()


def test_the_coder_models_card_has_the_figures_of_its_evaluation() -> None:
    card, evaluation = (OVERLAYS / CARDS[_CODER]).read_text(), evaluation_of(_CODER)
    faithful, kept = evaluation["faithful"], evaluation["needles"]["retention"]["2048"]
    lengths = [prompt["prompt_tokens"] for prompt in faithful["prompts"]]
    assert len(lengths) >= 100
    assert kept["of"] >= 200
    assert f"{len(lengths)} held-out prompts of {min(lengths):,} to {max(lengths):,} tokens" in card
    for group in ("from 2048", "from 4096", "from 8192", "from 16384", "all"):
        row, dense = faithful["rows"]["2048"][group], faithful["rows"]["dense"][group]
        low, high = (100 * bound for bound in row["agreement_interval"])
        line = f"| {group} | {row['prompts']} | {100 * dense['agreement']:.1f} % | {100 * row['agreement']:.1f} % "
        assert f"{line}[{low:.1f}, {high:.1f}] | {row['kl']:.4f} |" in card
    row = faithful["rows"]["2048"]["all"]
    low, high = row["length_interval"]
    assert f"| {row['length']:.1f} | {row['length_ratio']:.3f} [{low:.3f}, {high:.3f}] |" in card
    assert f"{kept['right']} of {kept['of']} = {100 * kept['right'] / kept['of']:.1f} %" in card
    for setting, name in (("dense", "dense"), ("2048", "top_k 2048")):
        passed = sum(task["passed"][setting] for task in evaluation["code"]["tasks"])
        assert re.search(rf"\| {name} \| .* \| {passed} of {len(evaluation['code']['tasks'])} \|", card)
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (OVERLAYS / picture).is_file()
