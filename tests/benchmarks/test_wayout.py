"""The benchmark of the way out runs, and a stream's events pass at a known cost; `python -m benchmarks.wayout` prints it."""

from __future__ import annotations

import pytest

from benchmarks.wayout import measure


@pytest.mark.alone
@pytest.mark.process
@pytest.mark.model
def test_the_way_out_of_a_crowd() -> None:
    row = measure(16, 4000.0, 128, 64, chat=False, most=64)
    print(f"{row.server * 1e6:.0f} us a token in the server, {row.engine * 1e6:.0f} in the engine")
    assert row.tokens_an_event == pytest.approx(1.0, abs=0.02)
    assert (
        row.server < 150e-6
    )  # CPU time; the requests' own cost is in it, and a crowded machine's cold caches
