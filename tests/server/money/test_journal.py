"""The journal of usage rows: no answer waits for the database, and nothing is lost when a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import event

from server.money import ledger as module
from server.money.journal import Journal
from server.money.ledger import Ledger
from server.money.rows import LedgerRow
from tests.kit import ROOT
from tests.server.money.kit import Heard, folder_of, read, row, until, waiting


def test_no_answer_waits_for_a_locked_database(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    commits: list[object] = []
    event.listen(ledger._engine, "commit", commits.append)
    with sqlite3.connect(path) as blocker:
        blocker.execute("begin immediate")
        began = time.monotonic()
        for number in range(200):
            ledger.append(row(f"{number:03}"), heard)
        assert heard.wait(200) == [True] * 200
        assert time.monotonic() - began < 3  # SQLite waits five seconds for the lock
        assert sorted(waiting(path)) == [f"{number:03}" for number in range(200)]
        assert ledger.waiting == 200
        assert ledger.spent() == {"anonymous": 200 * 7}
    blocker.close()
    ledger.close()
    assert len(read(path)) == 200
    assert len(commits) <= 3  # rows are moved many at once
    assert waiting(path) == []


@pytest.mark.process
def test_rows_of_a_killed_process_are_moved_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    Ledger(str(path)).close()
    code = """
import os, signal, sqlite3, sys, msgspec
from server.money.ledger import Ledger
from server.money.rows import LedgerRow
row, ledger = msgspec.json.decode(sys.argv[2], type=LedgerRow), Ledger(sys.argv[1])
blocker = sqlite3.connect(sys.argv[1])
blocker.execute("begin immediate")
said = []
def done(ok):
    said.append(ok)
    if len(said) == 50:
        os.kill(os.getpid(), signal.SIGKILL)
for number in range(50):
    ledger.append(msgspec.structs.replace(row, request_id=f"{number:02}"), done)
signal.pause()
"""
    killed = subprocess.run(
        [sys.executable, "-P", "-c", code, str(path), msgspec.json.encode(row("x")).decode()],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL
    assert (len(waiting(path)), read(path)) == (50, [])
    ledger = Ledger(str(path))
    assert ledger.spent() == {"anonymous": 50 * 7}  # whether they are moved already or not
    until(lambda: len(read(path)) == 50)
    ledger.close()
    assert not list(folder_of(path).iterdir())


def test_rows_of_a_running_process_are_its_own(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    first = Ledger(str(path))
    with sqlite3.connect(path) as blocker:
        blocker.execute("begin immediate")
        first.append(row("a"), heard)
        assert heard.wait(1) == [True]
        other = Journal(folder_of(path), LedgerRow)
        assert other.left == []  # the file is locked
        other.close()
    blocker.close()
    first.close()
    assert read(path) == [("a",)]


def test_a_file_has_its_name_only_when_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a process that starts at the same time would take it over, and its owner would wait for the lock."""
    begun: list[Journal[LedgerRow]] = []
    lock = fcntl.flock

    def another_starts(file: Any, how: int) -> None:
        if how == fcntl.LOCK_EX and not begun:
            monkeypatch.setattr("server.money.journal.fcntl.flock", lock)
            begun.append(Journal(tmp_path, LedgerRow))
        lock(file, how | fcntl.LOCK_NB)  # raises if the other one has it

    monkeypatch.setattr("server.money.journal.fcntl.flock", another_starts)
    journal = Journal(tmp_path, LedgerRow)
    assert len(list(tmp_path.glob("*.rows"))) == 2
    for one in (journal, *begun):
        one.close()
    assert not list(tmp_path.iterdir())


def test_what_was_left_without_a_row_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "1-a.rows").touch()
    (tmp_path / "2-b.rows").write_text('{"request_id": "cut')
    journal = Journal(tmp_path, LedgerRow)
    assert journal.left == []
    assert "not finished" in caplog.text
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_no_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then rows go to the database, which may be on another disk, and answers wait for it."""

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    monkeypatch.setattr("server.money.journal.os.fdatasync", full)
    ledger.append(row("a"), heard)
    assert heard.wait(1) == [True]
    assert (read(path), waiting(path)) == ([("a",)], [])
    assert "No space left on device" in caplog.text
    monkeypatch.setattr(module, "_RETRY_SECONDS", ())
    with sqlite3.connect(path) as other:
        other.execute("alter table dsa_usage rename to away")
    other.close()
    ledger.append(row("b"), heard)
    assert heard.wait(2) == [True, False]
    assert ledger.problem is not None
    assert '"request_id":"b"' in caplog.text  # a lost row is kept in the log
    ledger.close()


def test_a_full_disk_is_told_at_once_and_no_longer_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01,))
    ledger = Ledger(str(path))

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, sqlite3.connect(path) as other:
        patch.setattr(Journal, "append", full)
        patch.setattr(os, "posix_fallocate", full)
        other.execute("alter table dsa_usage rename to away")
        ledger.append(row("a"), heard)
        assert heard.wait(1) == [False]
        assert ledger.behind
        time.sleep(0.1)
        assert ledger.behind  # though nobody tries
        other.execute("alter table away rename to dsa_usage")
    other.close()
    until(lambda: not ledger.behind)
    assert ledger.problem is None
    assert waiting(path) == []  # what was tried left nothing behind
    ledger.append(row("b"), heard)
    assert heard.wait(2) == [False, True]
    ledger.close()
    assert read(path) == [("b",)]
