"""A thread that notices when the engine process hangs, dumps what is known of it, and kills it.

Liveness is progress: the engine's `Pulse` has to move. A process that is stopped, that waits for a lock or for a device
that never answers does not move it. On a CPU one step of a large model may take minutes, so processor time counts as
movement there, but not for ever.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from engine.pulse import DUMP_SIGNAL, Pulse

_log = logging.getLogger(__name__)

PATIENCE = 10
"""An engine that loads, or that only its processor time shows to work, gets so many times the limit."""

_DUMP_SECONDS = 1.0
_BUSY = 0.25  # of a core: the processor time of an engine that computes
_MOST_THREADS = 32


class Watchdog:
    """Watches one engine process until `close`, or until it has killed the process."""

    def __init__(
        self,
        pid: int,
        pulse: Pulse,
        seconds: float,
        *,
        loading: Callable[[], bool],
        on_cpu: Callable[[], bool],
        about: Callable[[], str],
    ) -> None:
        """Begin to watch. Call it on the event loop.

        Args:
            pid: the process, which leads a process group of its own.
            pulse: what it moves.
            seconds: how long the pulse may stand still; time in which the event loop did not run does not count, because
                then the engine may be waiting for the server.
            loading: whether the process still loads; called in the watchdog's thread, as the next two.
            on_cpu: whether it computes on the CPU, so that processor time is movement.
            about: what the server knows about it, for the log.
        """
        self._pid = pid
        self._pulse = pulse
        self._seconds = seconds
        self._loading = loading
        self._on_cpu = on_cpu
        self._about = about
        self._loop = asyncio.get_running_loop()
        self._loop_ran = True
        self._closed = threading.Event()
        self.quiet = 0.0
        self.fault: str | None = None
        self._poll = min(1.0, seconds / 10)
        self._thread = threading.Thread(target=self._watch, name="engine watchdog", daemon=True)
        self._thread.start()

    quiet: float
    """For how many seconds the engine has not moved."""

    fault: str | None
    """Why the process was killed; None: it was not."""

    def close(self) -> None:
        """Watch no more. Returns when the thread has ended."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, processor = self._pulse.count, _processor_seconds(self._pid)
        last, silent = time.monotonic(), 0.0
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._poll), now  # this process may have been suspended, too
            if not self._event_loop_runs():
                continue
            loading = self._loading()  # read first: the engine beats before it says that it is ready
            if (count := self._pulse.count) != seen:
                seen, self.quiet, silent = count, 0.0, 0.0
                continue
            silent += passed
            used, processor = processor, _processor_seconds(self._pid)
            busy = processor is None or (used is not None and processor - used > _BUSY * passed)
            self.quiet = 0.0 if busy and self._on_cpu() else self.quiet + passed
            patient = PATIENCE * self._seconds
            limit = patient if loading else self._seconds
            if self.quiet >= limit or silent >= patient:
                self._end(silent)
                return

    def _event_loop_runs(self) -> bool:
        ran, self._loop_ran = self._loop_ran, False
        if ran:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._note_loop)
        return ran

    def _note_loop(self) -> None:
        self._loop_ran = True

    def _end(self, silent: float) -> None:
        """Dump the process, and kill it and its children."""
        fault = f"the engine made no progress for {silent:.0f} s"
        stacks = self._stacks()
        _log.error(
            "%s (process %d, %s); it is replaced. %s\n%s",
            fault, self._pid, self._about(), describe(self._pid), stacks or "It could not write its stacks.",
        )  # fmt: skip
        self.fault = fault
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)

    def _stacks(self) -> str:
        with suppress(ProcessLookupError):
            os.kill(self._pid, DUMP_SIGNAL)
        stacks, end = "", time.monotonic() + _DUMP_SECONDS
        while time.monotonic() < end:
            time.sleep(_DUMP_SECONDS / 10)
            if (more := self._pulse.dump()) and more == stacks:
                break
            stacks = more
        return stacks.rstrip()


def describe(pid: int) -> str:
    """What the system says of a process's threads: state, and where in the kernel each waits. Linux only."""
    said = []
    try:
        for task in sorted(Path(f"/proc/{pid}/task").iterdir())[:_MOST_THREADS]:
            status = dict(
                line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line
            )
            place = ""
            with suppress(OSError):
                place = (task / "wchan").read_text().strip("0\n")
            said.append(f"{status.get('Name', '?')} {status.get('State', '?')} {place}".rstrip())
    except OSError:
        pass
    counted = {line: said.count(line) for line in said}
    return (
        "Threads: " + ", ".join(f"{count} x {line}" for line, count in counted.items()) + "."
        if counted
        else ""
    )


def _processor_seconds(pid: int) -> float | None:
    """The processor time that a process has used; None where the system does not tell it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
