"""What the usage ledger has: rows of the database, and rows that wait for it in the journal."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from server.money.ledger import journal_folder


def ledger_rows(path: Path) -> list[dict[str, Any]]:
    """Each durable row of a SQLite ledger once."""
    folder = journal_folder(str(path))
    assert folder is not None
    # The journal first: a row that is moved meanwhile is then in both.
    waiting = [json.loads(line) for file in folder.glob("*.rows") for line in file.read_bytes().splitlines()]
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        assert [tuple(row) for row in connection.execute("pragma integrity_check")] == [("ok",)]
        moved = [dict(row) for row in connection.execute("select * from dsa_usage order by rowid")]
    finally:
        connection.close()
    known = {row["request_id"] for row in moved}
    assert len(known) == len(moved)
    return moved + [row for row in waiting if row["request_id"] not in known]
