"""Charges each request, and writes it into the ledger exactly once.

The engine reports to an `Account` what each choice used. When the last choice is settled, the account prices the
whole request and appends one row to the ledger. The last event of a successful request is sent only after its row
is durable. A request that was cancelled, or whose time was over, pays for what was computed. A failed request pays nothing, but its row says what it
used. The prices are `server.money.pricing`, the table of rows is `server.money.rows`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from engine.protocol import RequestUsage, Work, add_work
from server.generation.choice import ChoiceUsage, Job
from server.money.ledger import Ledger
from server.money.pricing import NANO, Bill, PriceBook, Tokens, price
from server.money.retries import Retries
from server.money.rows import LedgerRow

SETTLE_SECONDS = 10.0
"""How long an answer waits for the engine to release its choices. It takes a step, unless the engine hangs."""


class LedgerUnavailableError(Exception):
    """The request's row could not be written."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """The result of one closed account, for the metrics."""

    bill: Bill
    prompt_tokens: int
    completion_tokens: int
    work: Work
    key: str
    verified: bool
    arrived: datetime


@dataclass(frozen=True, slots=True)
class Books:
    """What all accounts share: the prices, the ledger if there is one, and the callbacks that count."""

    prices: PriceBook
    ledger: Ledger | None
    model: str
    closed: Callable[[Settlement], None]  # on the event loop, once per request, when its row is durable
    ledger_failed: Callable[[], None]
    open_accounts: set[Account] = field(default_factory=set)
    retries: Retries = field(default_factory=Retries)

    def close(self) -> None:
        """Close every open account and the ledger. Call it after the engine has stopped."""
        for account in tuple(self.open_accounts):
            account.abandon("failed")
            account.settle_all()
        if self.ledger is not None:
            self.ledger.close()


class Account:
    """One request's account. Only the event loop's thread may use it."""

    def __init__(
        self,
        books: Books,
        *,
        request_id: str,
        endpoint: str,
        key: str,
        jobs: Sequence[Job],
        attempt: str | None = None,
        verified: bool = False,
        closed: Callable[[Settlement | None], None] = lambda entry: None,
    ) -> None:
        """Open an account.

        Args:
            books: what all accounts share.
            request_id: of the request, for its row.
            endpoint: the same.
            key: the name of the caller.
            jobs: the choices.
            attempt: the name of the request that this is an attempt of; None: it is no other's.
            verified: the caller has shown a key that this server knows.
            closed: called once, when the row is durable, or with None when it could not be written.
        """
        self._verified, self._when_closed = verified, closed
        self._attempt = attempt
        self._books = books
        self._request_id, self._endpoint, self._key = request_id, endpoint, key
        self._arrived = datetime.now(UTC)
        self._table = books.prices.table
        self._index_top_k = jobs[0].submit.index_top_k
        self._jobs = jobs
        self._unsettled = {job.submit.request_id for job in jobs}
        self._usages: dict[str, RequestUsage] = {}
        self._settled = asyncio.Event()
        self._abandoned: str | None = None
        self._closed = False
        books.open_accounts.add(self)

    def settle(self, request_id: str, usage: RequestUsage | None) -> None:
        """Record that the engine has released one choice. `usage` is None if the engine never had the choice."""
        if request_id not in self._unsettled:
            return
        self._unsettled.discard(request_id)
        if usage is not None:
            self._usages[request_id] = usage
        if not self._unsettled:
            self._settled.set()
            if self._abandoned is not None:
                self._close_abandoned(self._abandoned)

    def settle_all(self) -> None:
        """Settle every open choice without usage, because the engine is gone."""
        for request_id in tuple(self._unsettled):
            self.settle(request_id, None)

    def abandon(self, outcome: str) -> None:
        """End the account without an answer. The row is written when the engine has released every choice."""
        if self._closed or self._abandoned is not None:
            return
        self._abandoned = outcome
        if not self._unsettled:
            self._close_abandoned(outcome)

    async def finish(self, usages: Sequence[ChoiceUsage], outcome: str) -> Bill:
        """End the account with an answer: price it, and return the bill once the row is durable.

        Raises:
            LedgerUnavailableError: the row could not be written.
        """
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                await self._settled.wait()
        except TimeoutError:
            pass  # the engine hangs: the price uses what it reported last
        prompt = sum(usage.prompt_tokens for usage in usages)
        cached = sum(usage.cached_tokens for usage in usages)
        reasoning = sum(usage.reasoning_tokens or 0 for usage in usages)
        tokens = Tokens(cached, prompt - cached, sum(usage.completion_tokens for usage in usages), reasoning)
        entry, row = self._price(tokens, outcome, free=False)
        await self._write(entry, row)
        return entry.bill

    def _close_abandoned(self, outcome: str) -> None:
        cached = uncached = completion = 0
        charged = False
        for job in self._jobs:
            charged &= job.shares_prompt  # the choices of one prompt pay for it once
            usage = self._usages.get(job.submit.request_id)
            if usage is None or not usage.work.rows:
                continue
            if not charged:
                cached += usage.cached_tokens
                uncached += min(usage.work.rows, usage.prompt_tokens - usage.cached_tokens)
                charged = True
            completion += usage.completion_tokens
        entry, row = self._price(
            Tokens(cached, uncached, completion), outcome, free=outcome not in ("cancelled", "deadline")
        )
        self._append(entry, row, lambda written: None)

    def _price(self, tokens: Tokens, outcome: str, *, free: bool) -> tuple[Settlement, LedgerRow]:
        self._closed = True
        self._books.open_accounts.discard(self)
        work = add_work(*(usage.work for usage in self._usages.values()))
        bill = price(
            self._table,
            self._books.model,
            self._arrived,
            Tokens(0, 0, 0) if free else tokens,
            index_top_k=self._index_top_k,
            seconds=work.device_seconds,
            dense_seconds=work.dense_seconds,
        )
        bill = bill.without(self._books.retries.paid(self._attempt))
        row = LedgerRow(
            request_id=self._request_id,
            arrived_us=int(self._arrived.timestamp() * 10**6),
            day=self._arrived.date().isoformat(),
            key=self._key,
            model=self._books.model,
            endpoint=self._endpoint,
            outcome=outcome,
            top_k=self._index_top_k,
            prompt_tokens=tokens.cached + tokens.uncached,
            cached_tokens=tokens.cached,
            completion_tokens=tokens.completion,
            reasoning_tokens=tokens.reasoning,
            selected_tokens=work.selected_tokens,
            index_pairs=work.index_pairs,
            kv_rows_read=work.kv_rows_read,
            flops=work.flops,
            cache_bytes=work.cache_bytes,
            device_ns=round(work.device_seconds * NANO),
            dense_ns=round(work.dense_seconds * NANO),
            price_version=bill.price_version,
            currency="USD",
            amount_nanos=bill.amount,
            metered_nanos=bill.metered,
            dense_equivalent_nanos=bill.dense_equivalent,
        )
        return Settlement(
            bill, row.prompt_tokens, row.completion_tokens, work, self._key, self._verified, self._arrived
        ), row

    async def _write(self, entry: Settlement, row: LedgerRow) -> None:
        written: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def done(ok: bool) -> None:
            if not written.done():
                written.set_result(ok)

        self._append(entry, row, done)
        if not await written:
            raise LedgerUnavailableError("the usage ledger cannot be written, so the answer is held back")

    def _append(self, entry: Settlement, row: LedgerRow, done: Callable[[bool], None]) -> None:
        books = self._books

        def counted(ok: bool) -> None:
            if ok:
                books.retries.pay(self._attempt, entry.bill.amount)
                books.closed(entry)
            else:
                books.ledger_failed()
            self._when_closed(entry if ok else None)
            done(ok)

        if books.ledger is None:
            counted(True)
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no loop runs: these are the last rows, at the end of the process
            books.ledger.append(row, lambda ok: None)
            return
        books.ledger.append(row, lambda ok: _call(loop, counted, ok))


def _call(loop: asyncio.AbstractEventLoop, counted: Callable[[bool], None], ok: bool) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(counted, ok)
