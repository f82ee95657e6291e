"""Budgets without a server: what is reserved, what is spent, and what a new start reads from the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol import Work
from server.access.budget import Budgets, BudgetSpentError, Demand, worst_price
from server.access.keys import KeyRecord
from server.access.limits import LimitError
from server.money.accounting import Settlement
from server.money.pricing import DEFAULT_TABLE, Tokens, price, read_table

TABLE = read_table(DEFAULT_TABLE)
TOKENS, MACHINE = "deepseek-v3.2", "anything"  # USD a million tokens: 0.28, cached 0.028, output 0.42
NOW = datetime(2026, 5, 17, 12, tzinfo=UTC)


def record(usd: str = "1", period: str = "total", name: str = "a") -> KeyRecord:
    return KeyRecord.model_validate(
        {"name": name, "sha256": ["0" * 64], "budget": {"usd": usd, "period": period}}
    )


def entry(
    amount: int, *, key: str = "a", at: datetime = NOW, seconds: float = 0.0, verified: bool = True
) -> Settlement:
    bill = price(TABLE, TOKENS, at, Tokens(0, 0, 0), index_top_k=None, seconds=0, dense_seconds=0)

    work = Work(prefill_seconds=seconds, decode_seconds=seconds)
    return Settlement(replace(bill, amount=amount), 10, 10, work, key, verified, at)


class Ledger:
    def __init__(self, **spent: Mapping[str, int]) -> None:
        self.spent = spent

    def __call__(self, since: str | None) -> Mapping[str, int]:
        return self.spent.get(since or "ever", {})


def budgets(model: str = TOKENS, now: Any = lambda: NOW, **spent: Mapping[str, int]) -> Budgets:
    return Budgets(Ledger(**spent), lambda: TABLE, model, now)


def test_requests_at_once_cannot_spend_the_same_money() -> None:
    book, key = budgets(), record("0.0001")  # 100,000 nano-dollars
    demand = Demand(100, 100, None)  # 28,000 + 42,000, and four of rounding
    end = book.reserve(key, demand)
    assert book.held(key) == 70_004
    with pytest.raises(LimitError, match="requests that run may need") as caught:
        book.reserve(key, demand)
    assert caught.value.code == "budget_reserved"
    end()
    end()  # counts once
    assert book.held(key) == 0
    book.charge(entry(50_000))
    with pytest.raises(BudgetSpentError, match=r"may cost 0.000070004 USD.*0.00005 of 0.0001 USD left"):
        book.reserve(key, demand)
    book.charge(entry(50_000))
    with pytest.raises(BudgetSpentError, match="is spent"):
        book.reserve(key, Demand(1, 1, None))
    book.reserve(record("0.0001", name="b"), demand)  # another's is its own


def test_spent_is_what_the_ledger_has() -> None:
    spent = {"ever": {"a": 900}, "2026-05-01": {"a": 90}, "2026-05-17": {"a": 9}}
    book = Budgets(lambda since: spent[since or "ever"], lambda: TABLE, TOKENS, lambda: NOW)
    found = [book.spent(record(period=period)) for period in ("total", "month", "day")]
    assert found == [900, 90, 9]
    book.charge(entry(1))
    found = [book.spent(record(period=period)) for period in ("total", "month", "day")]
    assert found == [901, 91, 10]


def test_a_period_ends() -> None:
    now = [NOW]
    book = budgets(now=lambda: now[0])
    book.charge(entry(7))
    now[0] = datetime(2026, 5, 18, 0, 0, 1, tzinfo=UTC)
    book.charge(entry(1, at=NOW))  # it arrived yesterday, so its row is yesterday's
    book.charge(entry(2, at=now[0]))
    assert [book.spent(record(period=p)) for p in ("total", "month", "day")] == [10, 10, 2]
    now[0] = datetime(2026, 6, 1, tzinfo=UTC)
    book.charge(entry(5, at=now[0]))
    assert [book.spent(record(period=p)) for p in ("total", "month", "day")] == [15, 5, 5]
    assert len(book._spent) <= 5


def test_strangers_are_not_counted() -> None:
    book = budgets()
    book.charge(entry(7, verified=False))
    assert book.spent(record()) == 0


def test_time_of_a_machine_is_estimated() -> None:
    book, key = budgets(MACHINE), record("1")
    end = book.reserve(key, Demand(10, 10, None))  # nothing is known: all that is left
    assert book.held(key) == 10**9
    with pytest.raises(LimitError):
        book.reserve(key, Demand(1, 1, None))
    end()
    book.charge(entry(0, seconds=1.0))  # 0.1 s a token, each way
    book.reserve(key, Demand(10, 10, None))
    hour = Decimal("0.10") * 10**9
    assert book.held(key) == int(2 * 2 * hour / 3600) + 4  # twice two seconds


@given(
    cached=st.integers(0, 10**6),
    uncached=st.integers(0, 10**6),
    completion=st.integers(0, 10**6),
    part=st.floats(0, 1),
)
def test_no_bill_of_tokens_is_above_the_worst(
    cached: int, uncached: int, completion: int, part: float
) -> None:
    demand = Demand(cached + uncached, completion, None)
    worst = worst_price(TABLE, TOKENS, NOW, demand, None)
    tokens = Tokens(cached, uncached, completion, int(part * completion))
    bill = price(TABLE, TOKENS, NOW, tokens, index_top_k=None, seconds=1, dense_seconds=1)
    assert worst is not None
    assert bill.amount <= worst
