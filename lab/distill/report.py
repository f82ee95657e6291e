"""Shows the progress of training: a bar on a terminal, else a line every `EVERY` steps."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lab.distill.train import StepLog

EVERY = 20
"""Steps between lines where there is no terminal."""


class TrainingReport:
    """Shows the steps of one run from `start` to `total`."""

    def __init__(self, console: Console, start: int, total: int) -> None:
        self._console = console
        self._start, self._total = start, total
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )  # fmt: skip
        # A bar that is written to a file or a container's log is noise.
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=start, status="")

    def __enter__(self) -> TrainingReport:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, log: StepLog) -> None:
        """Show a step that has ended."""
        mean = sum(log.loss) / len(log.loss)
        recall = sum(log.recall) / len(log.recall)
        status = f"{log.stage}  KL {mean:.4f}  recall {recall:.4f}  {log.seconds:.2f} s"
        if log.distance is not None:
            status = f"from dense {log.distance:.4f}  {status}"
        self._bar.update(self._task, completed=log.step + 1, status=status)
        if not self._console.is_terminal:
            done = log.step + 1
            if done % EVERY == 0 or done in (self._start + 1, self._total):
                self.say(f"step {done} of {self._total}  {status}")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
