"""Accounting is cheap beside what it accounts for; `python -m benchmarks.accounting` prints the figures."""

from __future__ import annotations

import pytest

from benchmarks.accounting import measure


@pytest.mark.alone
@pytest.mark.usefixtures("default_model")
def test_accounting_takes_less_than_a_hundredth_of_the_work() -> None:
    for one in measure((1, 8)):
        print(one, f"{one.engine_share:.3%} {one.server_share:.3%}")
        assert one.engine_share > 0
        assert one.server_share > 0
        assert one.engine_share + one.server_share < 0.01
