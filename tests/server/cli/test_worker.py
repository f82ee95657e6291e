"""`dsa worker`: what it hands over to the engine's node, and what it refuses before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app


def test_a_worker_becomes_the_engines_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    given: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: given.extend(arguments))
    result = CliRunner().invoke(app, ["worker", str(tmp_path)], env={"DSA_LEADER": "10.0.0.1:7000"})
    assert result.exit_code == 0, result.output
    assert given[1:] == [
        "-P", "-m", "engine.parallel.node", f"--weights={tmp_path}", "--leader=10.0.0.1:7000", "--wait-seconds=600.0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["model"], 2, "Missing option '--leader'"),
        (["/nowhere", "--leader=a:1"], 1, "error: there is no model '/nowhere'"),
    ],
)
def test_what_cannot_start_is_said(arguments: list[str], code: int, sentence: str) -> None:
    result = CliRunner().invoke(app, ["worker", *arguments], env={"TERM": "dumb", "COLUMNS": "200"})
    assert result.exit_code == code
    assert sentence in result.output
