"""The `dsa` command, made of its commands. Only the commands read arguments and environment.

Each command imports what it needs when it runs, so `dsa --help` is quick. No command imports torch, because processes
of their own compute.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from server.cli.chat import chat
from server.cli.keys import keys
from server.cli.lab import add_tools
from server.cli.pull import pull
from server.cli.serve import serve
from server.cli.usage import usage
from server.cli.worker import worker

app = typer.Typer(
    name="dsa",
    help="Serve language models with DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
for command in (serve, chat, pull, usage, worker):
    app.command(command.__name__)(command)
app.add_typer(keys)
add_tools(app)


def main() -> NoReturn:
    """Run the command line and leave the process."""
    signal.signal(signal.SIGTERM, _interrupt)  # PID 1 of a container has no default handler
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
