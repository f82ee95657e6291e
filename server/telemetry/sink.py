"""Writes lines to a descriptor from a thread of its own, so that whoever reads the log can neither stop nor end the server.

A reader that stalls costs memory up to a bound; what is beyond that is dropped and counted. A reader that has gone away
costs the lines. Both are told in the log, once it can be written again.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections import deque
from typing import TextIO

MOST_BYTES = 8 << 20
"""So much is kept for a reader that stalls."""


class LogSink:
    """One output, such as standard error. Any thread may write; no write waits."""

    def __init__(self, stream: TextIO, most_bytes: int = MOST_BYTES) -> None:
        """Begin a thread that writes to the stream's descriptor. A stream without one is written at once."""
        self._stream = stream
        self._most = most_bytes
        self._waiting: deque[bytes] = deque()
        self._size = 0  # bytes that wait
        self._lost = 0  # lines that were dropped since the log last said so
        self._changed = threading.Condition()
        self._writing = False
        try:
            self._file = stream.fileno()
        except (io.UnsupportedOperation, AttributeError):
            self._file = -1
        else:
            threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str) -> None:
        """Write whole lines. Never waits and never raises."""
        if self._file < 0:
            self._stream.write(text)
            return
        data = text.encode("utf-8", "replace")
        with self._changed:
            if self._size + len(data) > self._most:
                self._lost += text.count("\n")
                return
            self._waiting.append(data)
            self._size += len(data)
            self._changed.notify_all()

    def flush(self, seconds: float) -> None:
        """Wait until everything is written, but at most so long."""
        end = time.monotonic() + seconds
        with self._changed:
            while (self._waiting or self._writing) and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._writing = False
                self._changed.notify_all()
                while not self._waiting:
                    self._changed.wait()
                size, data = self._size, b"".join(self._waiting)
                self._waiting.clear()
                self._writing, lost, self._lost = True, self._lost, 0
            if lost:
                data += f"{lost} lines of the log were dropped here: nobody read them\n".encode()
            written = self._write(data)
            with self._changed:
                self._size -= size
                if not written:
                    self._lost += lost + data.count(b"\n") - bool(lost)

    def _write(self, data: bytes) -> bool:
        """Write all of it; False: nobody reads any more."""
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._file, view) :]
            except BlockingIOError:  # somebody has made the descriptor non-blocking
                time.sleep(0.05)
            except OSError:
                return False
        return True


class SinkHandler(logging.Handler):
    """Sends log records to a sink."""

    def __init__(self, sink: LogSink) -> None:
        super().__init__()
        self.sink = sink

    def createLock(self) -> None:  # noqa: N802 - logging's name
        """Have no lock: the sink has one, which nobody holds for long."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Format a record and write it. A record that cannot be formatted is told in its place."""
        try:
            text = self.format(record)
        except Exception as error:
            text = f"a line of {record.name} could not be written: {error}"
        self.sink.write(text + "\n")
