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
from typing import Any

import msgspec
import pytest
from sqlalchemy import event

from server.money import ledger as module
from server.money.ledger import Ledger, LedgerError, LedgerRow, open_database, report
from tests.kit import ROOT
from tests.server.fake_engine import FakeEngine
from tests.server.kit import client, make_app


def row(name: str, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "request_id": name, "arrived_us": 1, "day": "2026-01-02", "key": "anonymous", "model": "m",
        "endpoint": "/v1/completions", "outcome": "stop", "top_k": None, "prompt_tokens": 3, "cached_tokens": 1,
        "completion_tokens": 2, "reasoning_tokens": 0, "selected_tokens": 0, "index_pairs": 0, "kv_rows_read": 0,
        "flops": 0, "cache_bytes": 0, "device_ns": 5, "dense_ns": 6, "price_version": "1", "currency": "USD",
        "amount_nanos": 7, "metered_nanos": 8, "dense_equivalent_nanos": 9,
    }  # fmt: skip
    return LedgerRow(**(values | changes))


def read(path: Path, columns: str = "request_id") -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"select {columns} from dsa_usage order by request_id").fetchall()
    finally:
        connection.close()


class Heard:
    """Collects the calls of `done` from the ledger's thread."""

    def __init__(self) -> None:
        self.said: list[bool] = []
        self._any = threading.Condition()

    def __call__(self, written: bool) -> None:
        with self._any:
            self.said.append(written)
            self._any.notify_all()

    def wait(self, count: int) -> list[bool]:
        with self._any:
            assert self._any.wait_for(lambda: len(self.said) >= count, 30)
        return self.said


def test_a_row_is_on_disk_when_it_is_said_to_be(tmp_path: Path) -> None:
    path = tmp_path / "new" / "usage.sqlite"  # its folder is made
    ledger, heard, seen = Ledger(str(path)), Heard(), []

    def done(written: bool) -> None:
        seen.extend(read(path))
        heard(written)

    ledger.append(row("a"), done)
    assert heard.wait(1) == [True]
    assert seen == [("a",)]
    ledger.close()


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


def test_a_batch_is_one_commit_and_the_caller_never_waits(tmp_path: Path) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    commits: list[object] = []
    event.listen(ledger._engine, "commit", commits.append)
    with sqlite3.connect(path) as blocker:
        blocker.execute("begin immediate")
        for number in range(200):
            ledger.append(row(f"{number:03}"), heard)
        assert heard.said == []  # all were taken while nothing could be written
    blocker.close()
    assert heard.wait(200) == [True] * 200
    assert len(commits) <= 2
    ledger.close()
    assert len(read(path)) == 200


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
    """A number too large for the database raises the driver's error, not SQLAlchemy's; the thread must survive it."""
    path, heard = tmp_path / "usage.sqlite", Heard()
    ledger = Ledger(str(path))
    with sqlite3.connect(path) as blocker:
        blocker.execute("begin immediate")
        ledger.append(row("first"), heard)
        time.sleep(0.1)
        for name in ("good", "huge", "well"):
            ledger.append(row(name, flops=2**70 if name == "huge" else 1), heard)
    blocker.close()
    assert heard.wait(4) == [True, True, False, True]
    ledger.append(row("next"), heard)
    assert heard.wait(5)[-1] is True
    ledger.close()
    assert read(path) == [("first",), ("good",), ("next",), ("well",)]
    (record,) = (entry for entry in caplog.records if entry.levelname == "ERROR")
    lost = json.loads(record.getMessage().partition("the row is ")[2])
    assert (lost["request_id"], lost["flops"]) == ("huge", 2**70)


def test_a_database_that_comes_back_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, heard = tmp_path / "usage.sqlite", Heard()
    monkeypatch.setattr(module, "_RETRY_SECONDS", (0.01,))
    ledger = Ledger(str(path))
    with sqlite3.connect(path) as other:
        other.execute("alter table dsa_usage rename to away")
    ledger.append(row("lost"), heard)
    assert heard.wait(1) == [False]
    assert '"request_id":"lost"' in caplog.text
    with other:
        other.execute("alter table away rename to dsa_usage")
    other.close()
    ledger.append(row("kept"), heard)
    assert heard.wait(2) == [False, True]
    ledger.close()
    assert read(path) == [("kept",)]


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
from server.money.ledger import Ledger, LedgerRow
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
        ledger.append(row("lost"), heard)
        assert await asyncio.to_thread(heard.wait, 1) == [False]
        ready = await http.get("/health/ready")
        assert ready.status_code == 503
        assert ready.json()["state"] == "ledger"
        assert "the usage ledger cannot be written" in ready.json()["reason"]
        assert (await http.get("/health/live")).status_code == 200
        path.unlink()
        again = Ledger(str(path))  # makes the table
        ledger._engine.dispose()
        ledger.append(row("kept"), heard)
        assert (await asyncio.to_thread(heard.wait, 2))[1]
        assert (await http.get("/health/ready")).status_code == 200
        again.close()
    ledger.close()
    assert read(path) == [("kept",)]
