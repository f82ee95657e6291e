"""Prices: exact to the nano-dollar, in force at the right time, and safe against bad edits."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from server.money.pricing import DEFAULT_TABLE, PriceBook, PriceError, Tokens, price, read_table

TABLE = """
version: "{version}"
currency: USD
machine_hour: "3.60"
prices:
  - model: m
    valid_from: 2025-01-01T00:00:00Z
    tokens: {{ prompt_cached: "0.07", prompt_uncached: {uncached}, completion: "1.6801", reasoning: "2" }}
    windows:
      - {{ name: night, days: [fri], from: "22:00", until: "02:00", factor: "0.5" }}
    tiers:
      - {{ top_k: 2048, factor: "0.5" }}
      - {{ top_k: 64, factor: "0.25" }}
  - model: m
    valid_from: 2026-01-01T00:00:00Z
"""
NOON = datetime(2025, 6, 4, 12, tzinfo=UTC)


def write(path: Path, version: str = "1", uncached: str = '"0.56"') -> Path:
    path.write_text(TABLE.format(version=version, uncached=uncached))
    return path


def amount(path: Path, at: datetime = NOON, top_k: int | None = None, tokens: Tokens | None = None) -> int:
    bill = price(
        read_table(path),
        "m",
        at,
        tokens or Tokens(100, 1000, 10, 4),
        index_top_k=top_k,
        seconds=1.5,
        dense_seconds=3,
    )
    assert sum(bill.classes.values()) == bill.amount
    assert (bill.metered, bill.dense_equivalent) == (1_500_000, 3_000_000)
    return bill.amount


def test_amounts_are_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "prices.yaml")
    assert amount(path) == 100 * 70 + 1000 * 560 + round(Decimal("1680.1") * 6) + 4 * 2000
    assert amount(path, top_k=64) == round(7000 / 4) + 140000 + round(Decimal("1680.1") * 6 / 4) + 2000
    assert amount(path, top_k=65) == 3500 + 280000 + round(Decimal("1680.1") * 3) + 4000
    assert amount(path, datetime(2026, 1, 1, tzinfo=UTC)) == 1_500_000  # by the machine's time
    assert amount(path, datetime(2026, 1, 1, tzinfo=UTC), tokens=Tokens(0, 0, 0)) == 0


@pytest.mark.parametrize(
    ("when", "cheap"),
    [("06T21:59", False), ("06T22:00", True), ("07T01:59", True), ("07T02:00", False), ("06T01:00", False)],
)
def test_a_window_runs_past_midnight_from_its_day(tmp_path: Path, when: str, cheap: bool) -> None:
    at = datetime.fromisoformat(f"2025-06-{when}:00+00:00")  # the 6th is a Friday
    assert (amount(write(tmp_path / "p"), at) < 300_000) == cheap


def test_the_default_table_has_what_deepseek_published() -> None:
    table = read_table(DEFAULT_TABLE)
    million = Tokens(10**6, 10**6, 10**6)
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for model, usd in (("deepseek-v3.1", "2.31"), ("deepseek-v3.2", "0.728")):
        bill = price(table, model, now, million, index_top_k=None, seconds=0, dense_seconds=0)
        assert bill.amount == Decimal(usd) * 10**9
    assert price(table, "any", now, million, index_top_k=None, seconds=3600, dense_seconds=0).amount == 10**8


def test_a_bad_edit_keeps_the_old_table(tmp_path: Path) -> None:
    path = write(tmp_path / "prices.yaml")
    book = PriceBook(path, "m")
    for bad in (
        "0.56",
        '"nan"',
        '"-1"',
        '"0.57"',
        '"',
    ):  # a float; not a price; ...; the same version; no YAML
        write(path, uncached=bad)
        book.refresh()
        assert (book.table.version, book.current) == ("1", False)
        assert amount(write(tmp_path / "other")) == 585_080 + 1
    assert book.errors == 5
    path.unlink()
    book.refresh()
    assert book.errors == 6
    write(path, "2", '"0.57"')
    book.refresh()
    assert (book.table.version, book.current) == ("2", True)
    with pytest.raises(PriceError, match="no price for the model 'other'"):
        PriceBook(path, "other")
