"""What commands share: errors, the start of another program, and flags made from settings."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn, get_type_hints

import typer

from server.settings import FLAGS, Flag, Settings


def fail(message: object, code: int = 1) -> NoReturn:
    """Print one sentence and end the process."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by a program of this project, which then gets the signals and gives the exit status.

    -P keeps the current folder off the program's path, because a package called `engine` may lie there.
    """
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])  # noqa: S606 - our own list


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every setting, before its own flags. It gets them as keywords.

    A flag that is not given is None, so that the environment or the file can set the value.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [_parameter(name, flag) for name, flag in FLAGS.items()]
    parameters += [one for one in own if one.kind is one.KEYWORD_ONLY]

    def run(**given: Any) -> None:
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


_KINDS = get_type_hints(Settings)
_DEFAULTS = Settings()


def _parameter(name: str, flag: Flag) -> inspect.Parameter:
    kind = next((plain for plain in (bool, int, float) if _KINDS[name] in (plain, plain | None)), str)
    default = getattr(_DEFAULTS, name)
    shown = flag.shown or (f"{default:g}" if kind is float else default)
    text = f"{flag.help} [dim]\\[default: {shown}][/dim]"
    declared: Any
    if name == "model":
        declared = typer.Argument(help=text, show_default=False)
    else:
        dashed = name.replace("_", "-")
        names = [f"--{dashed}/--no-{dashed}"] if kind is bool else [f"--{dashed}"]
        declared = typer.Option(*names, help=text, rich_help_panel=flag.panel, metavar=flag.metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )
