"""Budgets: what callers have spent, and may spend, in whole nano-dollars.

A request that begins reserves what it can cost at worst. At its end what it did cost is spent, and the rest is free again. So
requests that run at once cannot spend the same money. Spent is what the ledger has: it is read from there at the start,
and a request counts when its row is durable. A server that is killed loses its reservations with its requests, and no money.

The worst case of a price for tokens is exact. The price of a machine's time depends on how long the request will take: it
is estimated from what requests took lately, with a factor. A request that takes longer may exceed the budget by that much.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from server.access.keys import KeyRecord
from server.access.limits import LimitError
from server.money.accounting import Settlement
from server.money.pricing import NANO, PriceTable, Tokens, price

SAFETY = 2.0
"""A request may take so many times as long as the slowest of late, by the token."""

_FADE = 0.99
_ROUNDING = 4  # nano-dollars: each of four classes of tokens is rounded by itself


class BudgetSpentError(Exception):
    """A caller's budget is spent, or too small for the request; the message says which."""


@dataclass(frozen=True, slots=True)
class Demand:
    """The most that a request can use.

    Attributes:
        prompt: its tokens, counted once for all choices of a prompt.
        completion: of all choices.
        index_top_k: tokens that attention may read; None is dense.
    """

    prompt: int
    completion: int
    index_top_k: int | None


class Slowest:
    """The slowest that requests were of late, in seconds of the device for a token. A slow one is forgotten by and by."""

    def __init__(self) -> None:
        self._prefill: float | None = None
        self._decode: float | None = None

    def observe(self, entry: Settlement) -> None:
        """Learn from a request that has ended."""
        if entry.prompt_tokens and entry.work.prefill_seconds:
            self._prefill = max(
                (self._prefill or 0.0) * _FADE, entry.work.prefill_seconds / entry.prompt_tokens
            )
        if entry.completion_tokens and entry.work.decode_seconds:
            self._decode = max(
                (self._decode or 0.0) * _FADE, entry.work.decode_seconds / entry.completion_tokens
            )

    def seconds(self, demand: Demand) -> float | None:
        """How long a request may take; None: no request has ended yet."""
        if self._prefill is None and self._decode is None:
            return None
        slowest = max(self._prefill or 0.0, self._decode or 0.0)
        prefill = slowest if self._prefill is None else self._prefill
        decode = slowest if self._decode is None else self._decode
        return SAFETY * (demand.prompt * prefill + demand.completion * decode)


def worst_price(
    table: PriceTable, model: str, at: datetime, demand: Demand, seconds: float | None
) -> int | None:
    """The most that a request can cost, in nano-dollars; None: it is not known.

    Args:
        table: the prices.
        model: the model's name in the table.
        at: when the request arrived.
        demand: the most that it can use.
        seconds: the longest that it may take; None: not known.
    """
    if seconds is None and table.entry(model, at).tokens is None:
        return None
    prompts = ((demand.prompt, 0), (0, demand.prompt))
    return _ROUNDING + max(
        price(
            table,
            model,
            at,
            Tokens(cached, uncached, demand.completion, reasoning),
            index_top_k=demand.index_top_k,
            seconds=seconds or 0.0,
            dense_seconds=0.0,
        ).amount
        for cached, uncached in prompts
        for reasoning in (0, demand.completion)
    )


def periods(at: datetime) -> tuple[str, str, str]:
    """The names of the periods that a moment (UTC) is in: all time, its month, its day."""
    return "total", f"{at:%Y-%m}", f"{at:%Y-%m-%d}"


class Budgets:
    """What callers have spent and reserved.

    Args:
        spent: reads from the ledger what each caller has spent since a day (YYYY-MM-DD; None: ever), by name.
        table: gives the prices that are in force.
        model: the model's name in the table.
        clock: the time, in UTC.
    """

    def __init__(
        self,
        spent: Callable[[str | None], Mapping[str, int]],
        table: Callable[[], PriceTable],
        model: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read the ledger. Raises its errors."""
        self._table, self._model, self._clock = table, model, clock
        self._slowest = Slowest()
        self._held: defaultdict[str, int] = defaultdict(int)
        self._spent: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
        total, month, day = periods(clock())
        for period, since in ((total, None), (month, f"{month}-01"), (day, day)):
            self._spent[period].update(spent(since))

    def spent(self, record: KeyRecord) -> int:
        """What a caller has spent in the period of its budget, in nano-dollars."""
        total, month, day = periods(self._clock())
        period = {"total": total, "month": month, "day": day}[
            record.budget.period if record.budget else "total"
        ]
        return self._spent[period][record.name]

    def held(self, record: KeyRecord) -> int:
        """What requests that run may still cost a caller, in nano-dollars."""
        return self._held[record.name]

    def charge(self, entry: Settlement) -> None:
        """Count a request whose row is durable. It belongs to the periods in which it arrived, as in the ledger."""
        self._slowest.observe(entry)
        if not entry.verified:
            return
        known = {*periods(self._clock()), *periods(entry.arrived)}
        for period in periods(entry.arrived):
            self._spent[period][entry.key] += entry.bill.amount
        for period in [name for name in self._spent if name not in known]:
            del self._spent[period]

    def reserve(self, record: KeyRecord, demand: Demand) -> Callable[[], None]:
        """Reserve what a request can cost at worst. Returns a function that ends the reservation; call it once.

        Raises:
            BudgetSpentError: too little money is left for the request.
            LimitError: there is enough, but requests that run may need it.
        """
        if record.budget is None:
            return lambda: None
        limit, spent, held = record.budget.nanos, self.spent(record), self.held(record)
        name, left = record.name, limit - spent
        if left <= 0:
            raise BudgetSpentError(
                f"the budget of the key {name} is spent: {_usd(spent)} of {_usd(limit)} USD"
                f"{_until(record.budget.period)}"
            )
        worst = worst_price(self._table(), self._model, self._clock(), demand, self._slowest.seconds(demand))
        if worst is None:
            worst = left  # nothing is known: one request at a time
        if worst > left:
            raise BudgetSpentError(
                f"the request may cost {_usd(worst)} USD, but the key {name} has {_usd(left)} of {_usd(limit)} USD left"
                f"{_until(record.budget.period)}; lower max_tokens or shorten the prompt"
            )
        if worst > left - held:
            raise LimitError(
                f"the request may cost {_usd(worst)} USD; the key {name} has {_usd(left)} USD left, of which requests that "
                f"run may need {_usd(held)}; try again when they have ended",
                code="budget_reserved",
                retry_after=2.0,
            )
        self._held[name] += worst
        amount = worst

        def end() -> None:
            nonlocal amount
            self._held[name] -= amount
            amount = 0

        return end


def _until(period: str) -> str:
    return {"total": "", "month": " for this month (UTC)", "day": " for this day (UTC)"}[period]


def _usd(nanos: int) -> str:
    return f"{nanos / NANO:.9f}".rstrip("0").rstrip(".")
