"""The lab's tools as commands: each is in `dsa --help`, and gets its arguments as they were typed."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from server.cli.lab import TOOLS
from server.cli.main import app


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_gets_its_arguments_unchanged(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: started.append([program, *arguments]))
    arguments = ["--help", "-x", "--", "a b", "--top-k=256,512", "--no-such", ""]
    assert CliRunner().invoke(app, [name, *arguments]).exit_code == 0
    assert started == [[sys.executable, sys.executable, "-P", "-m", TOOLS[name][0], *arguments]]


@pytest.mark.parametrize("name", TOOLS)
def test_the_line_in_the_list_is_the_first_of_the_tools_own_help(name: str) -> None:
    module, line = TOOLS[name]
    command = typer.main.get_command(import_module(f"{module}.__main__").app)
    assert (command.help or "").splitlines()[0] == line
