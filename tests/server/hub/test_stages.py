"""Progress without a terminal: one line for each stage, not one for each block."""

from __future__ import annotations

import io

import pytest

from server.hub import stages as console
from server.hub.stages import Stages


def test_a_stage_is_one_line() -> None:
    out = io.StringIO()
    with Stages(out) as stages:
        stages("downloading", 0, 0)
        for done in range(100):
            stages("downloading", done, 100)
        stages("checking", 1, 4)
    assert out.getvalue() == "downloading\nchecking 25 %\n"


def test_a_long_stage_shows_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_QUIET_SECONDS", -1.0)
    out = io.StringIO()
    with Stages(out) as stages:
        for done in range(3):
            stages("loading", done, 4)
    assert out.getvalue() == "loading\nloading 25 %\nloading 50 %\n"


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Stages(out) as stages:
        stages("loading", 1, 2)
    assert "loading" in out.getvalue()
