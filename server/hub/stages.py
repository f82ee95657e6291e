"""Shows the progress of a long operation on the command line: a bar on a terminal, else a few lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 2.0


class Stages:
    """Shows one stage after the other. An instance is a `server.hub.download.Report`.

    Args:
        stream: where to write; None is standard error.
        say: if given, it gets the lines instead of the stream, and there is no bar.
        quiet_seconds: the least time between two lines about one stage; None is two seconds.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        say: Callable[[str], None] | None = None,
        *,
        quiet_seconds: float | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._say = say
        self._quiet_seconds = _QUIET_SECONDS if quiet_seconds is None else quiet_seconds
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._stage = ""
        self._said = 0.0

    def __enter__(self) -> Stages:
        if self._say is None and self._stream.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._bar.add_task("starting", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; 0 of 0 means that its length is not known."""
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=done, total=total or None)
            return
        now = time.monotonic()
        if stage != self._stage or now - self._said > self._quiet_seconds:
            share = f" {100 * done // total} %" if done and total else ""
            if self._say is not None:
                self._say(f"{stage}{share}")
            else:
                print(f"{stage}{share}", file=self._stream, flush=True)
            self._stage, self._said = stage, now
