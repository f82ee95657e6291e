"""Prices usage: a versioned table of prices, and exact arithmetic in whole nano-dollars.

A price table is a YAML file; the default is `prices.yaml` beside this module. Prices are decimal strings,
never floats. The entry, window and tier that are valid at a request's arrival give its price.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
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
    """Hours of UTC in which prices are multiplied by `factor`. If `until` is before `from`, it spans midnight."""

    name: str
    days: tuple[Day, ...] = _DAYS  # days on which the window starts
    start: Annotated[time, Field(alias="from")]
    until: time
    factor: Money

    def holds(self, at: datetime) -> bool:
        """Whether `at` (UTC) is inside the window."""
        clock, day = at.time(), at.weekday()
        if self.start < self.until:
            return self.start <= clock < self.until and _DAYS[day] in self.days
        return (clock >= self.start and _DAYS[day] in self.days) or (
            clock < self.until and _DAYS[day - 1] in self.days
        )


class Tier(_Part):
    """A factor on prices for requests whose attention reads at most `top_k` tokens."""

    top_k: Annotated[int, Field(ge=1)]
    factor: Money


class TokenPrices(_Part):
    """Prices in USD for a million tokens."""

    prompt_cached: Money
    prompt_uncached: Money
    completion: Money
    reasoning: Money | None = None  # for reasoning tokens of the completion; None: the price of `completion`


class PriceEntry(_Part):
    """One model's prices from a moment on, until its next entry."""

    model: str  # "*" is every model without an entry of its own
    valid_from: datetime
    tokens: TokenPrices | None = None  # None: the machine's time is charged
    windows: tuple[Window, ...] = ()
    tiers: tuple[Tier, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.valid_from.tzinfo is None:
            raise ValueError("valid_from needs a time zone, such as 2025-09-29T00:00:00Z")
        return self


class PriceTable(_Part):
    """The content of a price table's file."""

    version: Annotated[str, Field(min_length=1, max_length=64)]
    currency: Literal["USD"]
    machine_hour: Money  # USD for an hour of the device
    prices: tuple[PriceEntry, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        starts = [(entry.model, entry.valid_from) for entry in self.prices]
        if len(set(starts)) < len(starts):
            raise ValueError("two entries of one model have the same valid_from")
        return self

    def entry(self, model: str, at: datetime) -> PriceEntry:
        """The entry that is valid for a model at a moment.

        Raises:
            PriceError: no entry is valid.
        """
        for name in (model, "*"):
            valid = [e for e in self.prices if e.model == name and e.valid_from <= at]
            if valid:
                return max(valid, key=lambda e: e.valid_from)
        raise PriceError(f"the price table {self.version!r} has no price for the model {model!r}")


def read_table(path: Path) -> PriceTable:
    """Read and check a price table's file.

    Raises:
        PriceError: the file cannot be read, or its content is wrong.
    """
    try:
        return parse_table(yaml.safe_load(path.read_text("utf-8")), f"the price table {path}")
    except OSError as error:
        raise PriceError(f"the price table {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PriceError(f"the price table {path} is not YAML: {' '.join(str(error).split())}") from error


def parse_table(content: Any, name: str = "the price table") -> PriceTable:
    """Check what a price table's file holds.

    Raises:
        PriceError: it is wrong.
    """
    try:
        return PriceTable.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the table"
        raise PriceError(f"{name} is wrong at {where}: {problem['msg']}") from error


class PriceBook:
    """The price table that is used. If an edit of its file is wrong, the old table stays and the error is reported.

    Attributes:
        errors: how many edits were refused.
        current: whether the table that is used is the file's.
    """

    def __init__(self, path: Path, model: str, machine_hour: Decimal | None = None) -> None:
        """Read the file. Raises the errors of `read_table`."""
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

    def use(self, table: PriceTable) -> None:
        """Use another table until the file changes.

        Raises:
            PriceError: it has the version of the table that is used, or no price for the model.
        """
        table = self._fitted(table)
        if table != self.table and table.version == self.table.version:
            raise PriceError(
                f"the price table has the version {table.version!r}, as the one in force; give it a new one"
            )
        self.table = table

    def _read(self) -> PriceTable:
        return self._fitted(read_table(self._path))

    def _fitted(self, table: PriceTable) -> PriceTable:
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
    """The tokens to charge; `completion` includes the reasoning tokens."""

    cached: int
    uncached: int
    completion: int
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Bill:
    """The amounts of one request, in whole nano-dollars. `classes` sums to `amount`."""

    amount: int
    classes: dict[Class, int]
    metered: int
    dense_equivalent: int
    price_version: str

    def without(self, paid: int) -> Bill:
        """The bill of what is left to pay, where `paid` nano-dollars were paid before."""
        classes = dict(self.classes)
        for name, nanos in self.classes.items():
            part = max(min(nanos, paid), 0)
            classes[name], paid = nanos - part, paid - part
        return replace(self, amount=sum(classes.values()), classes=classes)


def machine_nanos(table: PriceTable, seconds: float) -> int:
    """The price of device time in nano-dollars. The seconds are first rounded to nanoseconds."""
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
    """Price one request. Arithmetic is exact; each class of tokens is rounded once, half to even.

    Args:
        table: the prices.
        model: the model's name in the table.
        at: when the request arrived.
        tokens: the tokens to charge; all 0 for a failed request, which then costs nothing.
        index_top_k: tokens that attention could read; None is dense.
        seconds: measured time of the device.
        dense_seconds: the device time that dense attention would have taken.

    Raises:
        PriceError: the table has no entry for the model.
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
        each = factor * NANO / 10**6  # USD for a million tokens -> nano-dollars for a token
        classes = {
            "prompt_cached": round(Fraction(p.prompt_cached) * each * tokens.cached),
            "prompt_uncached": round(Fraction(p.prompt_uncached) * each * tokens.uncached),
            "completion": round(Fraction(p.completion) * each * (tokens.completion - tokens.reasoning)),
            "reasoning": round(Fraction(reasoning) * each * tokens.reasoning),
        }
    return Bill(sum(classes.values()), classes, metered, machine_nanos(table, dense_seconds), table.version)
