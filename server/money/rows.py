"""The table of usage rows: its columns, its database, and sums of it. `server.money.ledger` appends to it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    inspect,
    select,
)  # fmt: skip
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.schema import DDL

_CREATE_SECONDS = (0.05, 0.1, 0.2, 0.4)
_AT_ONCE = 500  # ids in one query

TABLE = Table(
    "dsa_usage",
    MetaData(),
    Column("request_id", String(64), primary_key=True),
    Column("arrived_us", BigInteger, nullable=False),  # microseconds since 1970, UTC
    Column("day", String(10), nullable=False, index=True),  # day of the arrival, UTC
    Column("key", String(64), nullable=False),  # a digest of the bearer token; never the token
    Column("model", String(256), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("outcome", String(32), nullable=False),
    Column("top_k", Integer),  # NULL is dense
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("reasoning_tokens", BigInteger, nullable=False),
    Column("selected_tokens", BigInteger, nullable=False),
    Column("index_pairs", BigInteger, nullable=False),
    Column("kv_rows_read", BigInteger, nullable=False),
    Column("flops", BigInteger, nullable=False),
    Column("cache_bytes", BigInteger, nullable=False),
    Column("device_ns", BigInteger, nullable=False),
    Column("dense_ns", BigInteger, nullable=False),
    Column("price_version", String(64), nullable=False),
    Column("currency", String(3), nullable=False),
    Column("amount_nanos", BigInteger, nullable=False),
    Column("metered_nanos", BigInteger, nullable=False),
    Column("dense_equivalent_nanos", BigInteger, nullable=False),
)
for _action in ("UPDATE", "DELETE"):
    event.listen(
        TABLE,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER dsa_usage_no_{_action.lower()} BEFORE {_action} ON dsa_usage "
            "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `TABLE`. Amounts are in nano-dollars; `_us` is microseconds, `_ns` nanoseconds."""

    request_id: str
    arrived_us: int
    day: str
    key: str
    model: str
    endpoint: str
    outcome: str
    top_k: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    selected_tokens: int
    index_pairs: int
    kv_rows_read: int
    flops: int
    cache_bytes: int
    device_ns: int
    dense_ns: int
    price_version: str
    currency: str
    amount_nanos: int
    metered_nanos: int
    dense_equivalent_nanos: int


class LedgerError(ValueError):
    """The ledger cannot be opened, read or written; the message says why."""


def open_database(where: str, *, create: bool) -> Engine:
    """Connect to a SQLAlchemy URL or a SQLite file.

    Raises:
        LedgerError: the database cannot be opened.
    """
    try:
        if "://" not in where:
            path = Path(where).expanduser()
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            elif not path.is_file():
                raise LedgerError(f"there is no ledger at {path}; name one with --ledger")
            where = f"sqlite:///{path}"
        engine = create_engine(make_url(where))
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", _tune_sqlite)
        if create:
            _create(engine)
            _check_columns(engine, where)
    except (SQLAlchemyError, ArgumentError, OSError, ImportError) as error:
        raise LedgerError(
            f"the ledger {where} cannot be opened: {str(error).splitlines()[0]}; choose another with --ledger"
        ) from error
    return engine


def _create(engine: Engine) -> None:
    """Create the table if it is missing. It tries again, because servers that start together may disturb each other."""
    for wait in (*_CREATE_SECONDS, None):
        try:
            return TABLE.metadata.create_all(engine)
        except SQLAlchemyError:
            if wait is None:
                raise
            time.sleep(wait)
    return None


def _check_columns(engine: Engine, where: str) -> None:
    """Refuse a table of the same name with other columns, which would fail at every row."""
    has = {column["name"] for column in inspect(engine).get_columns(TABLE.name)}
    if lacks := [column.name for column in TABLE.columns if column.name not in has]:
        engine.dispose()
        raise LedgerError(
            f"the table {TABLE.name} of the ledger {where} has no column {lacks[0]}, so it is another program's or "
            "another version's; choose another ledger with --ledger"
        )


def _tune_sqlite(connection: Any, record: object) -> None:
    cursor = connection.cursor()
    # With these, a commit is on disk when it returns, and readers do not wait for the writer.
    for pragma in ("busy_timeout = 5000", "journal_mode = WAL", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def first_line(error: Exception) -> str:
    """What an error of the database says, without the statement."""
    return str(error).splitlines()[0]


DIMENSIONS = ("key", "model", "day", "outcome", "endpoint", "price_version")
SUMS = (
    "prompt_tokens", "cached_tokens", "completion_tokens", "device_ns",
    "amount_nanos", "metered_nanos", "dense_equivalent_nanos",
)  # fmt: skip


def report(
    engine: Engine, by: Iterable[str], since: str | None = None, until: str | None = None
) -> list[dict[str, Any]]:
    """Sum the rows, grouped by some of `DIMENSIONS`.

    Args:
        engine: the database.
        by: columns to group by.
        since: the first day, as YYYY-MM-DD in UTC; None is no limit.
        until: the last day, included; None is no limit.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    columns = [TABLE.c[name] for name in by]
    sums = [func.coalesce(func.sum(TABLE.c[name]), 0).label(name) for name in SUMS]
    query = select(*columns, func.count().label("requests"), *sums)
    if since is not None:
        query = query.where(TABLE.c.day >= since)
    if until is not None:
        query = query.where(TABLE.c.day <= until)
    try:
        with engine.connect() as connection:
            rows = connection.execute(query.group_by(*columns).order_by(*columns)).mappings()
            return [{name: int(v) if name in SUMS else v for name, v in row.items()} for row in rows]
    except SQLAlchemyError as error:
        raise LedgerError(f"the ledger cannot be read: {str(error).splitlines()[0]}") from error


def known_rows(engine: Engine, ids: Iterable[str]) -> set[str]:
    """Which of some requests have a row.

    Raises:
        LedgerError: the ledger cannot be read.
    """
    wanted, found = list(ids), set[str]()
    try:
        with engine.connect() as connection:
            for first in range(0, len(wanted), _AT_ONCE):
                some = wanted[first : first + _AT_ONCE]
                found.update(
                    connection.scalars(select(TABLE.c.request_id).where(TABLE.c.request_id.in_(some)))
                )
    except SQLAlchemyError as error:
        raise LedgerError(first_line(error)) from error
    return found
