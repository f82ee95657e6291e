"""The tools of the lab as commands of `dsa`. Each tool is a separate program that reads its own arguments."""

from __future__ import annotations

from collections.abc import Callable

import typer
from typer.core import TyperCommand

from server.cli.options import become

TOOLS = {
    "doctor": ("lab.doctor", "Say what this machine has, which kernels pass here, how fast it is, and what is missing."),
    "inspect": ("lab.inspect", "Say what a model is and needs, without loading it."),
    "bench": ("lab.bench", "Measure speed, of this server or of several side by side."),
    "calibrate": ("lab.calibrate", "Measure what steps cost on this machine, for dsa serve --cost-calibration."),
    "corpus": ("lab.corpus", "Build the text that an indexer is trained on and measured with."),
    "distill": ("lab.distill", "Train the lightning indexer that makes a dense model sparse."),
    "eval": ("lab.evaluate", "Say how faithful sparse attention is to dense attention."),
    "recall": ("lab.recall", "Measure how much of dense attention an indexer captures."),
}  # fmt: skip
"""Name of the command -> module of the tool, and the line about it in `dsa --help`."""


class _Passed(TyperCommand):
    """A command that passes its arguments on unread, --help too."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.args = list(args)
        return args


def add_tools(app: typer.Typer) -> None:
    """Add a command for every tool to `app`."""
    for name, (module, line) in TOOLS.items():
        app.command(name, cls=_Passed, help=line, rich_help_panel="Measure and train")(_starter(module))


def _starter(module: str) -> Callable[[typer.Context], None]:
    def start(ctx: typer.Context) -> None:
        become(module, *ctx.args)

    return start
