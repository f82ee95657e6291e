"""Usage to money: a versioned table of prices, and exact arithmetic in whole nano-dollars.

A price table is a YAML file (see `prices.yaml` beside this module, the default). Prices are decimal strings,
never floats. A request is priced by the entry, window and tier that hold when it arrived.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime, time
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

_log = logging.getLogger(__name__)

NANO = 10**9
DEFAULT_TABLE = Path(__file__).with_name("prices.yaml")
Class = Literal["prompt_cached", "prompt_uncached", "completion", "reasoning", "machine"]


class PriceError(ValueError):
    """A price table is not valid; the message says where."""


def _decimal_string(value: Any) -> Any:
    if not isinstance(value, str):
        raise ValueError('must be a decimal in quotes, such as "0.28", so that it is exact')
    return value


def _sane(value: Decimal) -> Decimal:
    if not value.is_finite() or not 0 <= value <= 10**6:
        raise ValueError("must be between 0 and 1000000")
    return value


Money = Annotated[Decimal, BeforeValidator(_decimal_string), AfterValidator(_sane)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
_DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Window(_Part):
    """Hours of UTC in which prices are multiplied; `until` before `from` runs past midnight."""

    name: str
    days: tuple[Day, ...] = _DAYS  # of the window's start
    start: Annotated[time, Field(alias="from")]
    until: time
    factor: Money

    def holds(self, at: datetime) -> bool:
        """Whether `at` (UTC) is inside."""
        clock, day = at.time(), at.weekday()
        if self.start < self.until:
            return self.start <= clock < self.until and _DAYS[day] in self.days
        return (clock >= self.start and _DAYS[day] in self.days) or (
            clock < self.until and _DAYS[day - 1] in self.days
        )


class Tier(_Part):
    """Prices are multiplied where attention reads no more than `top_k` tokens."""

    top_k: Annotated[int, Field(ge=1)]
    factor: Money


class TokenPrices(_Part):
    """USD a million tokens."""

    prompt_cached: Money
    prompt_uncached: Money
    completion: Money
    reasoning: Money | None = None  # of the completion; None: as completion


class Entry(_Part):
    """One model's prices from a moment on, until its next entry."""

    model: str  # "*" is every model that has none of its own
    valid_from: datetime
    tokens: TokenPrices | None = None  # None: priced by the machine's time
    windows: tuple[Window, ...] = ()
    tiers: tuple[Tier, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.valid_from.tzinfo is None:
            raise ValueError("valid_from needs a time zone, such as 2025-09-29T00:00:00Z")
        return self


class PriceTable(_Part):
    """All prices."""

    version: Annotated[str, Field(min_length=1, max_length=64)]
    currency: Literal["USD"]
    machine_hour: Money  # USD an hour of the device
    prices: tuple[Entry, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        starts = [(entry.model, entry.valid_from) for entry in self.prices]
        if len(set(starts)) < len(starts):
            raise ValueError("two entries of one model have the same valid_from")
        return self

    def entry(self, model: str, at: datetime) -> Entry:
        """The entry that holds for a model.

        Raises:
            PriceError: there is none.
        """
        for name in (model, "*"):
            valid = [e for e in self.prices if e.model == name and e.valid_from <= at]
            if valid:
                return max(valid, key=lambda e: e.valid_from)
        raise PriceError(f"the price table {self.version!r} has no price for the model {model!r}")


def read_table(path: Path) -> PriceTable:
    """Read and check a file.

    Raises:
        PriceError: it cannot be read, or what is in it is wrong.
    """
    try:
        return PriceTable.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise PriceError(f"the price table {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PriceError(f"the price table {path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the table"
        raise PriceError(f"the price table {path} is wrong at {where}: {problem['msg']}") from error


class PriceBook:
    """The table in force. A bad edit of its file keeps the old one, and is reported.

    Attributes:
        errors: edits that were refused.
        current: whether what the file holds is what is in force.
    """

    def __init__(self, path: Path, model: str, machine_hour: Decimal | None = None) -> None:
        """Read the file; see `read_table` for what it raises."""
        self._path, self._model, self._machine_hour = path, model, machine_hour
        self._stamp = self._look()
        self.table = self._read()
        self.errors = 0
        self.current = True

    def refresh(self) -> None:
        """Read the file again if it changed; never raises."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            table = self._read()
            if table != self.table and table.version == self.table.version:
                raise PriceError(
                    f"the price table {self._path} changed but is still version {table.version!r}; "
                    "give it a new version"
                )
        except PriceError as error:
            self.errors += 1
            self.current = False
            _log.error("%s; version %r stays in force", error, self.table.version)
            return
        self.table, self.current = table, True
        _log.warning("price table version %r is in force", table.version)

    def _read(self) -> PriceTable:
        table = read_table(self._path)
        if self._machine_hour is not None:
            table = table.model_copy(update={"machine_hour": self._machine_hour})
        table.entry(self._model, datetime.now(UTC))
        return table

    def _look(self) -> tuple[int, ...]:
        try:
            stat = self._path.stat()
        except OSError:
            return ()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is charged for; reasoning tokens are among the completion's."""

    cached: int
    uncached: int
    completion: int
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Bill:
    """Whole nano-dollars; `classes` sums to `amount`."""

    amount: int
    classes: dict[Class, int]
    metered: int
    dense_equivalent: int
    price_version: str


def machine_nanos(table: PriceTable, seconds: float) -> int:
    """What device time costs; the seconds are rounded to nanoseconds first."""
    return round(Fraction(table.machine_hour) * round(seconds * NANO) / 3600)


def price(
    table: PriceTable,
    model: str,
    at: datetime,
    tokens: Tokens,
    *,
    index_top_k: int | None,
    seconds: float,
    dense_seconds: float,
) -> Bill:
    """Price one request: exact rationals, each class rounded once, half to even.

    Args:
        table: the prices.
        model: its name in the table.
        at: when it arrived.
        tokens: what is charged for; all 0 for a request that failed, which then costs nothing.
        index_top_k: effective; None is dense.
        seconds: of the device, measured.
        dense_seconds: what dense attention would have taken.
    """
    entry = table.entry(model, at)
    factor = Fraction(1)
    for window in entry.windows:
        if window.holds(at):
            factor = Fraction(window.factor)
            break
    fitting = [tier for tier in entry.tiers if index_top_k is not None and index_top_k <= tier.top_k]
    if fitting:
        factor *= Fraction(min(fitting, key=lambda tier: tier.top_k).factor)
    metered = machine_nanos(table, seconds)
    classes: dict[Class, int]
    if entry.tokens is None:
        charged = bool(tokens.cached or tokens.uncached or tokens.completion)
        classes = {"machine": round(factor * metered) if charged else 0}
    else:
        p = entry.tokens
        reasoning = p.completion if p.reasoning is None else p.reasoning
        each = factor * NANO / 10**6  # USD a million tokens -> nano-dollars a token
        classes = {
            "prompt_cached": round(Fraction(p.prompt_cached) * each * tokens.cached),
            "prompt_uncached": round(Fraction(p.prompt_uncached) * each * tokens.uncached),
            "completion": round(Fraction(p.completion) * each * (tokens.completion - tokens.reasoning)),
            "reasoning": round(Fraction(reasoning) * each * tokens.reasoning),
        }
    return Bill(sum(classes.values()), classes, metered, machine_nanos(table, dense_seconds), table.version)
