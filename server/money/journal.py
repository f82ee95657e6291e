"""A journal of usage rows on this machine's disk: they are durable in it until the ledger's database has them.

Each process appends to a file of its own and holds a lock on it (`flock`). A file without a lock was left by a process that
ended before its rows were moved; the next one that starts takes it over. A row is a line of JSON. A last line that is cut
is no row: nobody was told that it is durable.
"""

from __future__ import annotations

import fcntl
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import msgspec

_log = logging.getLogger(__name__)

Row = TypeVar("Row", bound=msgspec.Struct)


class Journal(Generic[Row]):
    """Rows of one type in a folder. It is not safe for several threads at once."""

    def __init__(self, folder: Path, row: type[Row]) -> None:
        """Take over what processes that have ended left, and make a file of our own.

        Args:
            folder: it is made if it is missing.
            row: the type of the rows.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._encoder, self._decoder = msgspec.json.Encoder(), msgspec.json.Decoder(row)
        self.left: list[Row] = []
        self._taken = self._take_over()
        self._path = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.rows"
        # It gets its name when it is locked, so that no other process can take it over in between.
        unnamed = self._path.with_suffix(".new")
        self._file = unnamed.open("ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        unnamed.rename(self._path)
        _sync_folder(folder)

    left: list[Row]
    """Rows of processes that have ended. `clear` removes them from the disk."""

    def _take_over(self) -> list[tuple[Path, BinaryIO]]:
        taken: list[tuple[Path, BinaryIO]] = []
        for path in sorted(self._folder.glob("*.rows")):
            try:
                file = path.open("rb+", buffering=0)
            except FileNotFoundError:
                continue  # another process took it over and has removed it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its process runs
                file.close()
                continue
            if rows := self._read(path, file.read()):
                taken.append((path, file))
                self.left += rows
            else:
                path.unlink(missing_ok=True)
                file.close()
        return taken

    def _read(self, path: Path, content: bytes) -> list[Row]:
        rows: list[Row] = []
        *lines, cut = content.split(b"\n")
        for line in lines:
            try:
                rows.append(self._decoder.decode(line))
            except msgspec.MsgspecError as error:
                _log.error("a row of the journal %s cannot be read (%s); it is %r", path, error, line)
        if cut:
            _log.warning("the journal %s ends in a row that was not finished; nobody was told of it", path)
        return rows

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows; they are on disk when this returns.

        Raises:
            OSError: they are not, for example because the disk is full. What was written of them is taken back.
        """
        found = os.fstat(self._file.fileno())
        if not found.st_nlink:
            raise OSError(f"{self._path} was removed while the server runs")
        end = found.st_size
        content = b"".join(self._encoder.encode(row) + b"\n" for row in rows)
        try:
            written = self._file.write(content)
            if written != len(content):
                raise OSError(f"only {written} of {len(content)} bytes of {self._path} could be written")
            os.fdatasync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise

    def has_room(self, size: int = 1 << 16) -> bool:
        """Whether so many bytes could be written now."""
        found = os.fstat(self._file.fileno())
        try:
            os.posix_fallocate(self._file.fileno(), found.st_size, size)
        except OSError:
            return False
        finally:
            os.ftruncate(self._file.fileno(), found.st_size)
        return bool(found.st_nlink)

    def clear(self) -> None:
        """Remove all rows: the database has them."""
        os.ftruncate(self._file.fileno(), 0)
        for path, file in self._taken:
            path.unlink(missing_ok=True)
            file.close()
        self._taken, self.left = [], []

    def close(self) -> None:
        """Give the files up. What is in them is taken over by the next process; an empty file is removed."""
        if os.fstat(self._file.fileno()).st_size == 0:
            self._path.unlink(missing_ok=True)
        self._file.close()
        for _, file in self._taken:
            file.close()


def _sync_folder(folder: Path) -> None:
    """Make the names of a folder's files durable, too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def rows_in(folder: Path) -> int:
    """How many rows the journals in a folder have, of processes that run and that have ended."""
    count = 0
    for path in folder.glob("*.rows"):
        try:
            count += path.read_bytes().count(b"\n")
        except OSError:  # removed meanwhile, or another user's
            continue
    return count
