"""Absent tools: skipped on a developer's machine, a failure in CI."""

from __future__ import annotations

import pytest

from tests.deploy.kit import tool


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_an_absent_tool(monkeypatch: pytest.MonkeyPatch, ci: str, outcome: type[BaseException]) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="apt install some-package"):
        tool("no-such-tool", "some-package")
