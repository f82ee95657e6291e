"""The usage ledger alone: a row is on disk before `done` is called, and once only, even if others write too."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from server.money import ledger as module
from server.money.ledger import Ledger
from server.money.rows import LedgerError, open_database, report
from tests.kit import ROOT
from tests.ledger import ledger_rows
from tests.server.fake_engine import FakeEngine
from tests.server.kit import client, make_app
from tests.server.money.kit import Heard, folder_of, overwrite, read, row, until, waiting


def test_a_row_is_on_disk_when_it_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "new" / "usage.sqlite"  # its folder is made
    ledger, heard = Ledger(str(path)), Heard()
    seen: list[str] = []

    def done(written: bool) -> None:
        seen.extend(row["request_id"] for row in ledger_rows(path))
        heard(written)

    ledger.append(row("a"), done)
    assert heard.wait(1) == [True]
    assert seen == ["a"]
    until(lambda: read(path) == [("a",)])
    ledger.close()
    assert not list(folder_of(path).iterdir())


def test_nothing_is_doubled(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    ledger.append(row("a"), heard)
    heard.wait(1)
    with sqlite3.connect(path) as blocker:  # so that what follows is one batch
        blocker.execute("begin immediate")
        ledger.append(row("x"), heard)
        time.sleep(0.1)
        for name in ("a", "b", "b"):
            ledger.append(row(name, amount_nanos=1), heard)
    blocker.close()
    assert heard.wait(5) == [True] * 5
    ledger.close()
    assert read(path, "request_id, amount_nanos") == [("a", 7), ("b", 1), ("x", 7)]


def test_closing_writes_what_is_queued(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    for number in range(500):
        ledger.append(row(str(number)), heard)
    ledger.close()
    ledger.close()
    assert heard.said == [True] * 500
    assert len(read(path)) == 500


def test_a_row_that_cannot_be_written_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What no database takes is found before the row is said to be durable."""
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    for name, changes in (
        ("good", {}),
        ("huge", {"flops": 2**70}),
        ("long", {"outcome": "x" * 33}),
        ("well", {}),
    ):
        ledger.append(row(name, **changes), heard)
    assert heard.wait(4) == [True, False, False, True]
    ledger.close()
    assert read(path) == [("good",), ("well",)]
    huge, long = (entry for entry in caplog.records if entry.levelname == "ERROR")
    lost = json.loads(huge.getMessage().partition("the row is ")[2])
    assert (lost["request_id"], lost["flops"]) == ("huge", 2**70)
    assert "outcome has 33 characters, more than 32" in long.getMessage()


def test_a_database_that_comes_back_gets_what_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01,))
    ledger = Ledger(str(path))
    with sqlite3.connect(path) as other:
        other.execute("alter table dsa_usage rename to away")
    ledger.append(row("early"), heard)
    assert heard.wait(1) == [True]
    until(lambda: ledger.problem is not None)
    assert not ledger.behind  # not yet: it may come back
    monkeypatch.setattr(module, "BEHIND_SECONDS", 0.0)
    assert ledger.behind
    until(lambda: "1 usage rows wait" in caplog.text)
    with other:
        other.execute("alter table away rename to dsa_usage")
    other.close()
    ledger.append(row("late"), heard)
    assert heard.wait(2) == [True, True]
    ledger.close()
    assert (read(path), ledger.problem) == ([("early",), ("late",)], None)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("url", [False, True])
def test_a_file_that_is_removed_or_replaced_is_noticed_and_gets_what_waited_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool, url: bool
) -> None:
    path, away, heard, lost = tmp_path / "usage.sqlite", tmp_path / "away", Heard(), []
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01,))
    ledger = Ledger(f"sqlite:///{path}" if url else str(path), lambda: lost.append(True))
    ledger.append(row("before"), heard)
    heard.wait(1)
    until(lambda: read(path) == [("before",)])
    assert not ledger.behind
    path.rename(away)
    if replaced:
        path.write_bytes(b"")
    until(lambda: ledger.behind)  # without a row to write
    assert ("another file is at" if replaced else "was removed while") in (ledger.problem or "")
    ledger.append(row("meanwhile"), heard)
    assert heard.wait(2) == [True, True]  # it is in the journal
    until(lambda: waiting(path) == ["meanwhile"])
    with pytest.raises(LedgerError, match="cannot be read"):
        ledger.spent()
    assert path.exists() == replaced  # nothing made a new one
    assert not replaced or path.read_bytes() == b""
    away.replace(path)
    until(lambda: not ledger.behind and not ledger.waiting)
    assert (ledger.problem, lost) == (None, [True])
    ledger.close()
    assert read(path) == [("before",), ("meanwhile",)]


def test_rows_that_wait_for_a_lost_file_are_moved_by_the_next_start(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    path.unlink()
    ledger.append(row("a"), heard)
    assert heard.wait(1) == [True]
    ledger.close()
    assert not path.exists()
    again = Ledger(str(path))
    until(lambda: read(path) == [("a",)])
    again.close()


def test_a_journal_that_is_removed_is_not_written(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    for file in folder_of(path).iterdir():
        file.unlink()
    ledger.append(row("a"), heard)
    assert heard.wait(1) == [True]
    assert read(path) == [("a",)]  # not only in a file that nobody finds
    ledger.close()


def test_rows_are_never_changed(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    ledger = Ledger(str(path))
    ledger.append(row("a"), lambda written: None)
    ledger.close()
    connection = sqlite3.connect(path)
    for change in ("update dsa_usage set amount_nanos = 0", "delete from dsa_usage"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(change)
    connection.close()


def test_amounts_are_whole_nano_dollars(tmp_path: Path) -> None:
    """The amounts are beyond 2^53, where floats lose the last digits."""
    path = tmp_path / "usage.sqlite"
    ledger = Ledger(str(path))
    for name in ("a", "b"):
        ledger.append(row(name, amount_nanos=2**60 + 1), lambda written: None)
    ledger.close()
    assert read(path, "typeof(amount_nanos), amount_nanos") == [("integer", 2**60 + 1)] * 2
    engine = open_database(str(path), create=False)
    (total,) = report(engine, ["model"])
    engine.dispose()
    assert (total["amount_nanos"], type(total["amount_nanos"])) == (2**61 + 2, int)


def test_writers_that_start_at_once_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    start = threading.Barrier(4)

    def write(writer: int) -> list[bool]:
        heard = Heard()
        start.wait(30)
        ledger = Ledger(str(path))
        for number in range(100):
            ledger.append(row(f"{writer}-{number}"), heard)
        ledger.close()
        return heard.said

    with ThreadPoolExecutor(4) as pool:
        for said in pool.map(write, range(4)):
            assert said == [True] * 100
    assert len(read(path)) == 400


@pytest.mark.process
def test_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    code = """
import sys, msgspec
from server.money.ledger import Ledger
from server.money.rows import LedgerRow
row, ledger = msgspec.json.decode(sys.argv[2], type=LedgerRow), Ledger(sys.argv[1])
for number in range(100):
    ledger.append(msgspec.structs.replace(row, request_id=f"{row.request_id}-{number}"), print)
ledger.close()
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), msgspec.json.encode(row(name)).decode()],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        said, _ = writer.communicate(timeout=60)
        assert said.split() == ["True"] * 100
    assert len(read(path)) == 200


@pytest.mark.parametrize(
    "where", ["nosuch://host/db", "postgresql+nosuch://host/db", "sqlite:////proc/none/usage.sqlite", "://"]
)
def test_a_place_that_cannot_be_is_one_sentence_at_start(where: str) -> None:
    with pytest.raises(LedgerError) as caught:
        make_app(FakeEngine(), ledger=where)
    message = str(caught.value)
    assert message.startswith(f"the ledger {where} cannot be opened: ")
    assert message.endswith("choose another with --ledger")
    assert "\n" not in message


def test_a_file_that_is_no_ledger_is_one_sentence_at_start(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    path.write_text("a text, and not a short one, that is no database at all" * 20)
    with pytest.raises(LedgerError, match="file is not a database"):
        Ledger(str(path))


def test_a_table_with_other_columns_is_refused_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("create table dsa_usage (request_id text, note text)")
    connection.close()
    with pytest.raises(LedgerError, match="has no column arrived_us"):
        Ledger(str(path))


async def test_readiness_says_that_the_ledger_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01,))
    path, heard = tmp_path / "usage.sqlite", Heard()
    app = make_app(FakeEngine(), ledger=str(path))
    ledger = app.state.services.books.ledger
    async with client(app) as http:
        ledger._engine.dispose()  # a connection that is open already may go on beside what is there now
        path.write_bytes(b"no database" * 10_000)  # overwritten while it runs
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        ledger.append(row("early"), heard)
        assert await asyncio.to_thread(heard.wait, 1) == [True]
        await asyncio.to_thread(until, lambda: ledger.problem is not None)
        soon = await http.get("/health/ready")
        assert soon.status_code == 200  # answers do not wait for it yet
        assert "1 rows wait for it" in soon.json()["warnings"][0]
        monkeypatch.setattr(module, "BEHIND_SECONDS", 0.0)
        ready = await http.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["state"] == "ledger"
        assert "the usage ledger cannot be written" in ready.json()["reason"]
        assert (await http.get("/health/live")).status_code == 200
        backup = Ledger(str(tmp_path / "backup.sqlite"))  # makes the table
        backup.close()
        overwrite(path, (tmp_path / "backup.sqlite").read_bytes())
        ledger.append(row("late"), heard)
        assert (await asyncio.to_thread(heard.wait, 2))[1]
        await asyncio.to_thread(until, lambda: ledger.problem is None and not ledger.waiting)
        assert (await http.get("/health/ready")).json()["warnings"] == []
    ledger.close()
    assert read(path) == [("early",), ("late",)]
