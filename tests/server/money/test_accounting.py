"""Accounts without a server, over a real ledger: the amounts that are charged, and that each is counted once."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from engine.protocol import RequestUsage, SamplingParams, Submit, Work
from server.generation.choice import ChoiceUsage, Job
from server.money.accounting import Account, Books, LedgerUnavailableError, Settlement
from server.money.ledger import Ledger
from server.money.pricing import DEFAULT_TABLE, PriceBook
from tests.ledger import ledger_rows

MODEL = "deepseek-v3.2"  # USD a million tokens: 0.28, cached 0.028, output 0.42


class Desk:
    """Books with a ledger file, and the calls that their callbacks got."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed: list[Settlement] = []
        self.failures: list[None] = []
        self.ledger = Ledger(str(path))
        self.books = Books(
            PriceBook(DEFAULT_TABLE, MODEL),
            self.ledger,
            MODEL,
            self._close,
            lambda: self.failures.append(None),
        )

    def _close(self, entry: Settlement) -> None:
        assert self.rows()  # never counted before it is durable
        self.closed.append(entry)

    def account(self, *choices: str, shared: bool = False) -> Account:
        sampling = SamplingParams(max_tokens=20, seed=1)
        submits = [
            Submit(request_id=name, prompt_token_ids=(1,), sampling=sampling, index_top_k=64)
            for name in choices
        ]
        jobs = [Job(i, submit, shares_prompt=shared and i > 0) for i, submit in enumerate(submits)]
        return Account(self.books, request_id="r", endpoint="/v1/completions", key="anonymous", jobs=jobs)

    def rows(self) -> list[dict[str, Any]]:
        return ledger_rows(self.path)

    async def counted(self) -> Settlement:
        async with asyncio.timeout(10):
            while not self.closed:  # noqa: ASYNC110 - the account's callback fills it, without an event
                await asyncio.sleep(0.01)
        (entry,) = self.closed
        return entry


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncGenerator[Desk, None]:
    desk = Desk(tmp_path / "usage.sqlite")
    yield desk
    desk.ledger.close()


def used(seconds: float = 0.5, *, rows: int = 120, completion: int = 20) -> RequestUsage:
    return RequestUsage(
        prompt_tokens=100, cached_tokens=40, completion_tokens=completion, preemptions=0, index_top_k=64,
        queue_seconds=0.0, prefill_seconds=0.1, decode_seconds=0.4,
        work=Work(rows=rows, decode_seconds=seconds, dense_decode_seconds=2 * seconds),
    )  # fmt: skip


def said(completion: int = 20) -> ChoiceUsage:
    return ChoiceUsage(
        prompt_tokens=100, cached_tokens=40, completion_tokens=completion, index_top_k=64, queue_seconds=0.0
    )


async def test_an_answer_waits_for_its_row_and_is_counted_once(desk: Desk) -> None:
    account = desk.account("a", "b")
    account.settle("a", used())
    account.settle("a", used())  # reported twice
    account.settle("stranger", used())
    finishing = asyncio.create_task(account.finish([said(), said()], "stop"))
    await asyncio.sleep(0.05)
    assert not finishing.done()  # the engine still has b
    account.settle("b", used())
    bill = await finishing
    (row,) = desk.rows()
    # Two choices: 80 cached at 28 nano-dollars, 120 others at 280, 40 of output at 420.
    assert row["amount_nanos"] == bill.amount == 80 * 28 + 120 * 280 + 40 * 420
    assert sum(bill.classes.values()) == bill.amount
    assert all(type(nanos) is int for nanos in (bill.amount, bill.metered, *bill.classes.values()))
    assert row["device_ns"] == 10**9
    assert row["dense_equivalent_nanos"] == pytest.approx(2 * row["metered_nanos"], abs=1)
    account.abandon("cancelled")  # too late to change anything
    account.settle_all()
    assert (await desk.counted()).bill == bill
    assert len(desk.rows()) == 1
    assert desk.books.open_accounts == set()


@pytest.mark.parametrize(("outcome", "amount"), [("cancelled", 40 * 28 + 60 * 280 + 20 * 420), ("failed", 0)])
async def test_one_without_an_answer_is_written_when_the_engine_let_go(
    desk: Desk, outcome: str, amount: int
) -> None:
    account = desk.account("a", "b")
    account.abandon(outcome)
    account.abandon("something else")
    account.settle("a", used())
    await asyncio.sleep(0.05)
    assert desk.rows() == []
    account.settle("b", None)  # the engine never had it
    await desk.counted()
    (row,) = desk.rows()
    assert (row["outcome"], row["amount_nanos"]) == (outcome, amount)
    assert (row["device_ns"], row["completion_tokens"]) == (5 * 10**8, 20)
    assert row["metered_nanos"] > 0


@pytest.mark.parametrize("first", [used(), None, used(0.0, rows=0, completion=0)])
async def test_cancelled_choices_of_one_prompt_pay_for_it_once(
    desk: Desk, first: RequestUsage | None
) -> None:
    account = desk.account("a", "b", "c", shared=True)
    account.abandon("cancelled")
    for name, usage in (("c", used()), ("b", used()), ("a", first)):  # settled in any order
        account.settle(name, usage)
    await desk.counted()
    (row,) = desk.rows()
    assert (row["prompt_tokens"], row["cached_tokens"]) == (100, 40)
    assert row["completion_tokens"] == 40 + (first.completion_tokens if first else 0)


async def test_cancelled_in_the_queue_costs_nothing(desk: Desk) -> None:
    account = desk.account("a")
    account.abandon("cancelled")
    account.settle("a", used(0.0, rows=0, completion=0))
    await desk.counted()
    (row,) = desk.rows()
    assert (row["amount_nanos"], row["prompt_tokens"], row["metered_nanos"]) == (0, 0, 0)


async def test_without_its_row_an_answer_is_held_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("server.money.ledger._RETRY_SECONDS", ())
    monkeypatch.setattr("server.money.journal.os.fdatasync", full)
    with sqlite3.connect(desk.path) as other:
        other.execute("alter table dsa_usage rename to away")
    other.close()
    account = desk.account("a")
    account.settle("a", used())
    with pytest.raises(LedgerUnavailableError, match="held back"):
        await account.finish([said()], "stop")
    assert (desk.closed, len(desk.failures)) == ([], 1)
    assert "the ledger could not be written" in caplog.text


async def test_stopping_writes_what_is_open(desk: Desk) -> None:
    account = desk.account("a", "b")
    account.settle("a", used())
    desk.books.close()  # and waits for the ledger
    (row,) = desk.rows()
    assert (row["outcome"], row["amount_nanos"], row["device_ns"]) == ("failed", 0, 5 * 10**8)
