"""What the lab's tools share: how one starts and ends, and the flags that several have.

A tool is a program: `python -P -m lab.NAME`, which `dsa NAME` becomes. Its command line is a typer app in its
`__main__`, which imports torch only once it runs, so that help and wrong flags are answered at once.
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
"""The `dsa` of this very project, for tools that start a server."""


StageProgress = Callable[[str, int, int], None]
"""Called with a stage, how much of it is done, and how much there is; `Stages` shows it."""


class ToolError(Exception):
    """A tool cannot do it; the message is one sentence that says why and what to do."""


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
        help="One thread, and its CPU time in place of the clock's: for a machine that has other things to do.",
    ),
]


def program(help: str | None = None) -> typer.Typer:
    """An empty command line."""
    return typer.Typer(
        help=help, no_args_is_help=help is not None, add_completion=False, rich_markup_mode="rich",
        pretty_exceptions_enable=False,
    )  # fmt: skip


def start(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a tool's command line as `dsa NAME`, and return the exit status.

    Commands find in `typer.Context.obj` what the user typed.

    Args:
        app: the command line
        name: behind `dsa`
        arguments: behind the name; None for the process's own
    """
    if arguments is None:
        arguments = sys.argv[1:]
        signal.signal(signal.SIGTERM, _interrupt)  # ends as Ctrl-C does, so that started servers are stopped
    try:
        app(arguments, prog_name=f"dsa {name}", obj=shlex.join(["dsa", *name.split(), *arguments]))
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except (ToolError, EngineError, ModelError, TokenizerError, PromptError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def fail(message: object, code: int = 2) -> NoReturn:
    """Print one sentence and leave; 2 is the exit status of a wrong flag."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(code)


def find(model: str, overlay: Path | None = None) -> ModelFiles:
    """The files of a model, fetched where they are missing.

    Raises:
        ModelError: there is no such model.
    """
    with Stages() as stages:
        return resolve(model, overlay=overlay, report=stages)


def one_of(flag: str, value: str, allowed: Sequence[str] = get_args(PlainDtype)) -> Any:
    """The value of a flag that has few; others end the program."""
    return value if value in allowed else fail(f"{flag} is {value!r}; expected one of {', '.join(allowed)}")


def numbers(flag: str, text: str, expected: str) -> tuple[int, ...]:
    """`128,2048` as different numbers above 0; anything else ends the program."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        fail(f"{flag} is {text!r}; expected {expected}")
    return tuple(dict.fromkeys(map(int, parts)))


def size(flag: str, text: str) -> int:
    """Bytes of a size such as 512MiB; anything else ends the program."""
    try:
        return parse_size(text, flag)
    except SizeError as error:
        fail(error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
