"""`dsa distill`: what it hands to the trainer, and what it refuses before."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from lab.distill.__main__ import parser
from lab.distill.recipe import read_recipe
from server.cli.distill import DEFAULTS
from server.cli.main import app
from tests.kit import ROOT


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: calls.append([program, *arguments]))
    return calls


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


def test_it_becomes_the_trainer_with_the_options_that_were_given(
    started: list[list[str]], model: Path, corpus: Path
) -> None:
    arguments = [str(model), "--corpus", str(corpus), "--out", "o", "--default-top-k", "9", "--recipe", "{}"]
    assert CliRunner().invoke(app, ["distill", *arguments]).exit_code == 0
    ((program, *command),) = started
    assert program == sys.executable
    assert command[:3] == [sys.executable, "-m", "lab.distill"]
    options = parser().parse_args(command[3:])
    given = {"weights": model, "corpus": corpus, "out": Path("o"), "default_top_k": 9, "recipe": "{}"}
    assert vars(options) == vars(parser().parse_args(["--weights=", "--corpus=", "--out="])) | given


def test_every_option_of_the_trainer_can_be_given_and_the_help_has_its_defaults(
    started: list[list[str]], model: Path, corpus: Path
) -> None:
    trainer = vars(parser().parse_args(["--weights=", "--corpus=", "--out="]))
    optional = {name: value for name, value in trainer.items() if name not in ("weights", "corpus", "out")}
    assert {
        name: value for name, value in optional.items() if name not in ("recipe", "until", "start_from")
    } == DEFAULTS
    values = {name: "float32" if name == "dtype" else "5" for name in optional}
    flags = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", value)]
    result = CliRunner().invoke(app, ["distill", str(model), "--corpus", str(corpus), "--out", "o", *flags])
    assert result.exit_code == 0, result.output
    options = vars(parser().parse_args(started[0][4:]))
    assert {name: str(options[name]) for name in values} == values


def test_a_missing_corpus_is_a_sentence_with_the_command_that_builds_one(
    started: list[list[str]], model: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "none"
    result = CliRunner().invoke(app, ["distill", str(model), "--corpus", str(missing), "--out", "o"])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {missing} holds no corpus; build one: "
        f"python -m lab.corpus --out {missing} --model '{model}'\n"
    )
    assert started == []


def test_a_missing_model_is_a_sentence(started: list[list[str]], corpus: Path) -> None:
    result = CliRunner().invoke(app, ["distill", "nothing", "--corpus", str(corpus), "--out", "o"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: there is no model 'nothing'")
    assert result.stderr.count("\n") == 1
    assert started == []


def test_the_help_says_what_a_newcomer_needs() -> None:
    result = CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"})
    assert result.exit_code == 0
    for words in (
        "python -m lab.corpus --out DIR",
        "dsa serve --overlay",
        "[default: 512]",
        "goes on from there",
    ):
        assert words in result.output


def test_the_model_cards_command_is_the_one_that_the_overlays_header_tells_of() -> None:
    folder = ROOT / "engine" / "overlays"
    card = (folder / "README.md").read_text()
    with safe_open(folder / "smollm2-135m-instruct.safetensors", "pt") as file:
        header = file.metadata()
    written = re.findall(r"dsa distill smollm2-135m-instruct (.*?)\n\n", card, re.DOTALL)
    runs = [parser().parse_args(["--weights=x", *shlex.split(one.replace("\\\n", " "))]) for one in written]
    for before, after in itertools.pairwise(runs):
        assert after.start_from == before.out / "indexer.safetensors"
    options = runs[-1]
    made = json.loads(header["recipe"])
    assert read_recipe(options.recipe) == read_recipe(json.dumps(made["recipe"]))
    assert (options.until or read_recipe(options.recipe).total_steps) == made["steps"]
    sizes = [options.heads, options.dim, options.rope, options.default_top_k]
    assert sizes == [int(header[name]) for name in ("num_heads", "head_dim", "rope_dim", "default_top_k")]
    assert f"| `default_top_k` | {header['default_top_k']} |" in card
    evaluation = json.loads((ROOT / "docs" / "overlays" / "smollm2-135m-instruct.eval.json").read_text())
    digest = hashlib.sha256((folder / "smollm2-135m-instruct.safetensors").read_bytes()).hexdigest()
    assert evaluation["settings"]["overlay_sha256"] == digest
    for top_k, retention in evaluation["needles"]["retention"].items():
        assert f"| top_k {top_k} | " in card
        assert (
            f"{retention['right']} of {retention['of']} = {retention['right'] / retention['of']:.1%}".replace(
                "%", " %"
            )
            in card
        )
        assert f"+{evaluation['loss']['rows'][top_k]['all']['above_dense']:.4f}" in card
    for picture in re.findall(r"!\[.*\]\((.*)\)", card):
        assert (folder / picture).is_file()
