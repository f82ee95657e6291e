"""The usage ledger: one row for each request. Threads append rows in batches; no row is ever changed.

A row is durable before the request's last event is sent: in a journal on this machine's disk, from which it is moved into
the database. So if a client saw the end of its answer, the row exists, even if a process is killed afterwards. If a process
is killed in between, a row may exist for an end that the client never saw. Request ids are unique. If the commit of a batch
fails half-way, the batch is written again without the rows that exist already, so no row is written twice.
"""

from __future__ import annotations

import hashlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
from sqlalchemy import String, insert
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, OperationalError, SQLAlchemyError

from server.money.journal import Journal
from server.money.rows import TABLE, LedgerError, LedgerRow, first_line, known_rows, open_database, report
from server.money.watched import WatchedFile, sqlite_path

_log = logging.getLogger(__name__)

_RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0)
_WARN_SECONDS = 60.0
_AT_ONCE = 500  # rows in one commit

MOST_WAITING = 100_000
"""Rows that may wait for the database. Beyond that, answers wait for it, too."""

WATCH_SECONDS = 2.0
"""The time between two looks at the file of a SQLite ledger, while there are no rows."""

BEHIND_SECONDS = 60.0
"""For so long the database may take no rows before the server says that it is not ready."""

Done = Callable[[bool], None]
"""Called once a row is durable (True) or could not be written (False), in the ledger's thread."""


class _UnavailableError(Exception):
    """The database takes no rows now. `left` are those that it does not have."""

    def __init__(self, problem: str, left: dict[str, LedgerRow]) -> None:
        super().__init__(problem)
        self.problem, self.left = problem, left


class Ledger:
    """Takes rows from any thread.

    One thread makes rows durable in a journal on this machine's disk, so no answer waits for the database. Another moves
    them into the database, and tries for as long as it takes. What a killed process left in the journal is moved by the
    next one.

    A SQLite file that is removed or replaced while the server runs is noticed, and nothing more is written until the first
    one is back: rows wait in the journal.
    """

    def __init__(self, where: str, lost: Callable[[], None] = lambda: None) -> None:
        """Open the database and the journal, or create them.

        Args:
            where: a SQLAlchemy URL or a SQLite file.
            lost: called in one of the ledger's threads each time that the file is found removed or replaced.

        Raises:
            LedgerError: the database cannot be opened.
        """
        self._engine = open_database(where, create=True)
        path = sqlite_path(where)
        self._file = None if path is None else WatchedFile(path)
        self._lost: str | None = None
        self._full = False  # the journal could not be written when it was last tried
        self._when_lost = lost
        self._journal = _open_journal(where)
        self._queue: queue.SimpleQueue[tuple[LedgerRow, Done] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the journal, `_waiting` and `_over`
        self._waiting: list[LedgerRow] = [] if self._journal is None else list(self._journal.left)
        self._over = False
        self._moving = threading.Lock()  # while rows go from `_waiting` to the database
        self.problem: str | None = None
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._mover = threading.Thread(target=self._move_all, name="ledger-mover", daemon=True)
        if self._waiting:
            _log.info("%d usage rows of an earlier process are moved into the ledger", len(self._waiting))
        self._thread.start()
        self._mover.start()

    problem: str | None
    """Why the newest rows could not be written; None: they were. Any thread may read it."""

    @property
    def behind(self) -> bool:
        """Whether rows cannot be written, and answers wait for that or will soon, or the file is not where it was."""
        if self._lost is not None:
            return True
        if self.problem is None:
            return False
        late = time.monotonic() - self._since > BEHIND_SECONDS
        return self._journal is None or self._full or late or self.waiting > MOST_WAITING // 2

    @property
    def waiting(self) -> int:
        """How many durable rows are not in the database yet."""
        return len(self._waiting)

    def append(self, row: LedgerRow, done: Done) -> None:
        """Queue a row and return at once; `done` is called later."""
        self._queue.put((row, done))

    def spent(self, since: str | None = None) -> dict[str, int]:
        """What each key has been charged since a day (YYYY-MM-DD, UTC; None: ever), in nano-dollars.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        with self._moving:  # so that a row is either still waiting or in the database
            if self._look() is not None:  # SQLite would make a new file
                raise LedgerError(f"the ledger cannot be read: {self._lost}")
            sums = {row["key"]: int(row["amount_nanos"]) for row in report(self._engine, ["key"], since)}
            with self._changed:
                waiting = {row.request_id: row for row in reversed(self._waiting)}
            for known in known_rows(self._engine, waiting):
                del waiting[known]
        for row in waiting.values():
            if since is None or row.day >= since:
                sums[row.key] = sums.get(row.key, 0) + row.amount_nanos
        return sums

    def close(self) -> None:
        """Write the queued rows, then close the database. Idempotent. Rows that it does not take stay in the journal."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
            with self._changed:
                self._over = True
                self._changed.notify()
            self._mover.join()
            self._engine.dispose()
            if self._journal is not None:
                self._journal.close()

    def _run(self) -> None:
        over = False
        while not over:
            batch: list[tuple[LedgerRow, Done]] = []
            item = self._queue.get()
            while True:
                if item is None:
                    over = True
                    break
                batch.append(item)
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                lost = self._take([row for row, _ in batch])
                for row, done in batch:
                    done(row.request_id not in lost)

    def _take(self, rows: list[LedgerRow]) -> set[str]:
        """Make rows durable. Return the ids of those that are not."""
        unfit = {row.request_id: why for row in rows if (why := _unfit(row)) is not None}
        for row in rows:
            if row.request_id in unfit:
                _lost(row, unfit[row.request_id])
        rows = [row for row in rows if row.request_id not in unfit]
        if not rows:
            return set(unfit)
        with self._changed:
            if self._journal is not None and len(self._waiting) + len(rows) <= MOST_WAITING:
                try:
                    self._journal.append(rows)
                    self._full = False
                    self._waiting += rows
                    self._changed.notify()
                    return set(unfit)
                except OSError as error:  # the disk is full, say: perhaps the database is elsewhere
                    self._full = True
                    _log.error("the journal of usage rows cannot be written: %s", error)
        try:
            return self._write(rows, _RETRY_SECONDS) | set(unfit)
        except _UnavailableError as error:
            for row in error.left.values():
                _lost(row, error.problem)
            return set(error.left) | set(unfit)

    def _move_all(self) -> None:
        said = 0.0  # when a warning was last given
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._over, WATCH_SECONDS)
                over = self._over
                if over and not self._waiting:
                    return
                self._try_again()
            try:
                with self._moving:
                    self._look()
                    if self._waiting:
                        self._move()
                continue
            except _UnavailableError as error:
                if over or time.monotonic() - said > _WARN_SECONDS:
                    said = time.monotonic()
                    _log.warning(
                        "%d usage rows wait for the ledger's database: %s", self.waiting, error.problem
                    )
            with self._changed:
                if over:  # an attempt that began before the end may have failed for what is mended now
                    _log.warning("they stay in the journal, and the next start moves them")
                    return
                self._changed.wait_for(lambda: self._over, _RETRY_SECONDS[-1] if _RETRY_SECONDS else 0.0)

    def _try_again(self) -> None:
        """See whether a journal that was full has room: a server that is not ready gets no row to try it with."""
        if self._full and self._journal is not None and self._journal.has_room():
            self._full = False
            if not self._waiting:
                self.problem = None

    def _look(self) -> str | None:
        """Look whether the file is where it was. Returns why not. `_moving` is held, or there is no journal."""
        lost = None if self._file is None else self._file.lost()
        if lost is not None and self._lost is None:
            _log.error("%s; until then usage rows wait in the journal", lost)
            self._engine.dispose()  # open connections would go on with the file that is gone
            self._when_lost()
        if lost is None and self._lost is not None:
            _log.warning("the file of the ledger is back")
            self.problem = None
        self._lost = lost
        if lost is not None:
            self._fails(lost)
        return lost

    def _move(self) -> None:
        rows = self._waiting[:_AT_ONCE]
        self._write(rows, ())
        with self._changed:
            del self._waiting[: len(rows)]
            if not self._waiting and self._journal is not None:
                self._journal.clear()

    def _write(self, rows: list[LedgerRow], waits: Sequence[float]) -> set[str]:
        """Insert each request once. Return the ids of rows that the database refused for what is in them.

        Args:
            rows: what to insert.
            waits: seconds before each further attempt while the database takes no rows.

        Raises:
            _UnavailableError: it took none of the others, after some attempts.
        """
        left = {row.request_id: row for row in reversed(rows)}  # of rows with one id, only the first
        waiting = iter(waits)
        while True:
            again = True
            if (lost := self._look()) is not None:
                raise _UnavailableError(lost, left)
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(TABLE), [msgspec.structs.asdict(row) for row in left.values()])
                self.problem = None
                return set()
            except OperationalError as error:  # a state of the database, which may end
                problem = self._fails(first_line(error))
            except (
                SQLAlchemyError,
                OverflowError,
            ) as error:  # a fault of the rows; drivers raise OverflowError without SQLAlchemy's wrapper
                problem, again = first_line(error), False
                if isinstance(error, DatabaseError) and not isinstance(error, IntegrityError | DataError):
                    problem, again = self._fails(problem), True  # the file is damaged or overwritten
            try:  # the commit may have succeeded although it reported an error
                if has := known_rows(self._engine, left):
                    left = {name: row for name, row in left.items() if name not in has}
                    if left:
                        continue
                    self.problem = None
                    return set()
            except LedgerError as error:
                problem, again = str(error), True
            if not again and len(left) > 1:  # one bad row must not prevent the others
                return set[str]().union(*(self._write([row], waits) for row in left.values()))
            if not again:
                for row in left.values():
                    _lost(row, problem)
                return set(left)
            if (wait := next(waiting, None)) is None:
                self._engine.dispose()  # a connection that is open may go on with a file that is no longer there
                raise _UnavailableError(problem, left)
            time.sleep(wait)

    def _fails(self, problem: str) -> str:
        if self.problem is None:
            self._since = time.monotonic()
        self.problem = problem
        return problem


def _open_journal(where: str) -> Journal[LedgerRow] | None:
    folder = journal_folder(where)
    if folder is None:
        return None
    try:
        return Journal(folder, LedgerRow)
    except OSError as error:
        _log.warning(
            "usage rows have no journal on this machine, so answers wait for the ledger's database: %s", error
        )
        return None


def journal_folder(where: str) -> Path | None:
    """Where rows wait for a ledger: beside a SQLite file, or in the user's folder for state. None: nowhere."""
    path = sqlite_path(where)
    if path is not None:
        return Path(f"{path}.waiting")
    if make_url(where).get_backend_name() != "sqlite":
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
        return state / "dsa-serve" / "ledger" / hashlib.sha256(where.encode()).hexdigest()[:16]
    return None


def _unfit(row: LedgerRow) -> str | None:
    """Why no database takes a row, which would else be found out after its answer."""
    for column in TABLE.columns:
        value = getattr(row, column.name)
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            return f"{column.name} is {value}, which has more than 64 bits"
        if isinstance(column.type, String) and len(value) > (column.type.length or len(value)):
            return f"{column.name} has {len(value)} characters, more than {column.type.length}"
    return None


def _lost(row: LedgerRow, problem: str) -> None:
    """Keep a row that is lost in the log."""
    text = msgspec.json.encode(row).decode()
    _log.error("the ledger could not be written (%s); the row is %s", problem, text)
