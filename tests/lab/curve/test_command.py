"""`dsa bench curve` writes its files, and ends in one sentence if a flag is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.cli.test_main import dsa


@pytest.mark.slow
@pytest.mark.process
def test_it_hands_over_with_all_its_flags(tmp_path: Path) -> None:
    flags = [
        "--quick",
        "--positions=0,512",
        "--chunk=8",
        "--streams=1",
        "--rounds=1",
        "--price=2",
        "--dtype=float32",
    ]
    result = dsa("bench", "curve", "--out", str(tmp_path), "--threads=1", "--device=cpu", *flags)
    assert result.returncode == 0, result.stderr
    assert "prefill: 8 tokens a step, 2 USD an hour" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "curve.png"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--price=-1"], 1, "error: price is -1 USD an hour; it must be above 0"),
        (["--rounds=0"], 2, "--rounds"),
    ],
)
def test_errors_are_the_curves_or_the_command_lines(
    tmp_path: Path, arguments: list[str], code: int, sentence: str
) -> None:
    result = dsa("bench", "curve", "--out", str(tmp_path / "made"), *arguments)
    assert result.returncode == code
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
