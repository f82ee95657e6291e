"""Progress of the engine's small programs, whose standard output is their result."""

from __future__ import annotations

import sys
import time


class Lines:
    """Progress on standard error: a line when a stage begins, and every few seconds."""

    def __init__(self) -> None:
        self._stage, self._said = "", 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say where it stands: `done` of `total` of a stage."""
        now = time.monotonic()
        if stage != self._stage or now - self._said > 5:
            share = f" {100 * done // total} %" if done and total else ""
            sys.stderr.write(f"{stage}{share}\n")
            self._stage, self._said = stage, now
