"""What the lab's tools share: how a tool starts and ends, and common flags.

A tool is a program: `dsa NAME` becomes `python -P -m lab.NAME`. Its command line is a typer app in its `__main__`.
The app imports torch only when the tool runs, so that help and errors about flags come at once.
"""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, get_args

import typer

from engine.config import PlainDtype
from engine.errors import EngineError
from server.chat import PromptError
from server.hub.models import ModelError, ModelFiles, resolve
from server.hub.sizes import SizeError, parse_size
from server.hub.stages import Stages
from server.text.tokenizer import TokenizerError

DSA = (sys.executable, "-P", "-c", "from server.cli.main import main; main()")
"""The command `dsa` of this installation, for tools that start a server."""


StageProgress = Callable[[str, int, int], None]
"""Callback (stage, done, total) for progress; `Stages` shows it."""


class ToolError(Exception):
    """A tool cannot do its work; the message is one sentence that says why and what to do."""


ModelFlag = Annotated[
    str, typer.Argument(help="A name that dsa can fetch, a .gguf file, or a folder with config.json and *.safetensors.")
]  # fmt: skip
CorpusFlag = Annotated[
    Path, typer.Option(metavar="DIR", help="A folder made by dsa corpus --out DIR --model MODEL.")
]
OverlayFlag = Annotated[
    Path | None,
    typer.Option(help="A lightning indexer to lay over the model.", metavar="FILE", show_default="the model's own"),
]  # fmt: skip
DeviceFlag = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.")]
DtypeFlag = Annotated[str, typer.Option(help="Number format: auto, float32 or bfloat16.")]
ThreadsFlag = Annotated[int | None, typer.Option(help="CPU threads.", show_default="one per core", min=1)]
CpuTimeFlag = Annotated[
    bool,
    typer.Option(
        "--cpu-time",
        help="Use one thread and measure its CPU time, not the wall clock: for a machine with other work.",
    ),
]


def program(help: str | None = None) -> typer.Typer:
    """Make an empty command line."""
    return typer.Typer(
        help=help, no_args_is_help=help is not None, add_completion=False, rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )  # fmt: skip


def start(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a tool's command line as `dsa NAME`, and return the exit status.

    In a command, `typer.Context.obj` is the whole command that the user typed.

    Args:
        app: the command line
        name: the tool's name, as after `dsa`
        arguments: the arguments after the name; None takes those of the process
    """
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(
            signal.SIGTERM, _interrupt
        )  # SIGTERM acts like Ctrl-C, so that started servers are stopped
    try:
        app(arguments, prog_name=f"dsa {name}", obj=shlex.join(["dsa", *name.split(), *arguments]))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except (ToolError, EngineError, ModelError, TokenizerError, PromptError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def fail(message: object, code: int = 2) -> NoReturn:
    """Print an error and end the program with status `code`; 2 is the status for a wrong flag."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)


def find(model: str, overlay: Path | None = None) -> ModelFiles:
    """Return the files of a model; fetch those that are missing.

    Raises:
        ModelError: there is no such model, or it cannot be fetched.
    """
    with Stages() as stages:
        return resolve(model, overlay=overlay, report=stages)


def one_of(flag: str, value: str, allowed: Sequence[str] = get_args(PlainDtype)) -> Any:
    """Return the value of a flag; end the program if it is not among `allowed`."""
    return value if value in allowed else fail(f"{flag} is {value!r}; expected one of {', '.join(allowed)}")


def numbers(flag: str, text: str, expected: str) -> tuple[int, ...]:
    """Read different numbers above 0, such as `128,2048`; end the program if the text is something else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        fail(f"{flag} is {text!r}; expected {expected}")
    return tuple(dict.fromkeys(map(int, parts)))


def size(flag: str, text: str) -> int:
    """Read a size such as 512MiB as bytes; end the program if the text is something else."""
    try:
        return parse_size(text, flag)
    except SizeError as error:
        fail(error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
