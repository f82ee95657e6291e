"""How a lab tool ends: its exit status, and one sentence if it cannot go on."""

from __future__ import annotations

import pytest
import typer

from engine.errors import ConfigError
from lab.tool import ToolError, fail, numbers, one_of, program, size, start
from server.hub.models import ModelError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (ToolError("it is broken"), 1, "error: it is broken\n"),
        (ConfigError("the device is not known"), 1, "error: the device is not known\n"),
        (ModelError("there is no model"), 1, "error: there is no model\n"),
        (FileNotFoundError("no file"), 1, "error: no file\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(7), 7, ""),
    ],
)
def test_what_ends_a_tool(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    app = program()

    @app.command()
    def work() -> None:
        if error is not None:
            raise error

    assert start(app, "work", []) == code
    assert capsys.readouterr().err == said


def test_a_fault_of_the_tools_own_is_no_sentence() -> None:
    app = program()
    app.command()(lambda: [].pop())
    with pytest.raises(IndexError):
        start(app, "work", [])


def test_a_command_knows_what_was_typed() -> None:
    app, typed = program("Two commands."), []

    @app.command()
    def one(ctx: typer.Context, name: str) -> None:
        typed.append((ctx.command_path, ctx.obj))

    @app.command()
    def two() -> None:
        fail("never")

    assert start(app, "both of", ["one", "a b"]) == 0
    assert typed == [("dsa both of one", "dsa both of one 'a b'")]


def test_values_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert numbers("--n", "2, 1,2", "numbers") == (2, 1)
    assert one_of("--dtype", "bfloat16") == "bfloat16"
    assert size("--memory", "2KiB") == 2048
    for wrong in (
        lambda: numbers("--n", "0", "numbers"),
        lambda: one_of("--dtype", "x"),
        lambda: size("--m", "x"),
    ):
        with pytest.raises(typer.Exit) as left:
            wrong()
        assert left.value.exit_code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --n is '0'; expected numbers",
        "error: --dtype is 'x'; expected one of auto, float32, bfloat16",
        "error: --m is 'x'; expected a size such as 512MiB, 1GiB or a number of bytes",
    ]
