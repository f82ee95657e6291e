"""Rows for tests of the ledger, and where they are."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from server.money.ledger import journal_folder
from server.money.rows import LedgerRow


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


def waiting(path: Path) -> list[str]:
    """The ids of the rows on disk that wait for the database."""
    lines = [line for file in folder_of(path).glob("*.rows") for line in file.read_bytes().splitlines()]
    return [msgspec.json.decode(line, type=LedgerRow).request_id for line in lines]


def folder_of(path: Path) -> Path:
    found = journal_folder(str(path))
    assert found is not None
    return found


def overwrite(path: Path, database: bytes) -> None:
    """Put a database into a file that has something else. No look at it meanwhile finds half of it: its header comes last."""
    with path.open("r+b") as file:
        file.seek(100)
        file.write(database[100:])
        file.truncate(len(database))
        file.flush()
        file.seek(0)
        file.write(database[:100])


def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("waited 30 s in vain")
