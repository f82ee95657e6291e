"""A counter that the engine process moves and the server process reads, in memory that both map.

The engine moves it after each step, and once a second while it has nothing to do. Reading it needs neither the engine nor
the event loop to answer, so it tells a busy engine from one that hangs. Behind the counter the file has room for the
engine's stacks, which it writes when it gets `DUMP_SIGNAL`.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import tempfile

DUMP_SIGNAL = signal.SIGUSR1
_DUMP_AT = mmap.PAGESIZE


class Pulse:
    """One end of the counter. The server makes the file; the engine opens the descriptor that it inherits."""

    def __init__(self, file: int) -> None:
        """Map the file with this descriptor, which is closed with the pulse."""
        self._file = file
        self._map = mmap.mmap(file, _DUMP_AT)
        self._count = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls) -> Pulse:
        """Make a new file without a name, with the counter at 0.

        Raises:
            OSError: there is no descriptor or no room left.
        """
        with tempfile.TemporaryFile() as file:
            os.ftruncate(file.fileno(), _DUMP_AT)
            kept = os.dup(file.fileno())
        os.lseek(kept, _DUMP_AT, os.SEEK_SET)  # the engine's descriptor shares the place, and dumps there
        try:
            return cls(kept)
        except BaseException:
            os.close(kept)
            raise

    def fileno(self) -> int:
        """The descriptor that the engine process inherits."""
        return self._file

    @property
    def count(self) -> int:
        """How often the engine has moved the counter."""
        return self._count[0]

    def beat(self) -> None:
        """Move the counter. One thread may do this."""
        self._count[0] += 1

    def dump_on_signal(self) -> None:
        """From now on, write the stacks of all threads into the file at `DUMP_SIGNAL`.

        The handler is C and needs no interpreter lock. So it answers in a deadlock, too, but not in a stopped process.
        """
        faulthandler.register(DUMP_SIGNAL, self._file, all_threads=True, chain=False)

    def dump(self) -> str:
        """The stacks that the engine has written; empty: none."""
        size = os.fstat(self._file).st_size - _DUMP_AT
        return os.pread(self._file, size, _DUMP_AT).decode("utf-8", "replace") if size > 0 else ""

    def close(self) -> None:
        """Forget the file. Idempotent."""
        if self._file >= 0:
            self._count.release()
            self._map.close()
            os.close(self._file)
            self._file = -1
