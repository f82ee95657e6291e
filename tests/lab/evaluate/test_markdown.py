"""Tables of an evaluation in Markdown."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.table import Table

from lab.evaluate.markdown import main, markdown, written
from lab.evaluate.needles import NeedlesResult, Share
from lab.evaluate.report import needle_tables
from lab.evaluate.results import EvalResults


def results() -> EvalResults:
    needles = NeedlesResult(
        needles=[],
        skipped=0,
        accuracy={name: {"all": Share(right=8, of=10)} for name in ("dense", "64")},
        retention={"64": Share(right=7, of=8)},
    )
    return EvalResults(settings={"top_k": [64]}, environment={}, needles=needles)


def test_a_table_keeps_its_columns_and_loses_its_markup() -> None:
    table = Table(title="found", caption="of ten")
    table.add_column("way")
    table.add_column("share \\[95 %]", justify="right")
    table.add_row("a|b", "[bold red]50 %[/] \\[40, 60]")
    assert markdown(table) == (
        "**found**\n\n| way | share [95 %] |\n| --- | --: |\n| a\\|b | 50 % [40, 60] |\n\nof ten.\n"
    )


def test_all_tables_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results()
    assert found.needles is not None
    path = tmp_path / "eval.json"
    path.write_bytes(msgspec.json.encode(found))
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed == written(found, [64])
    assert printed.count("| --- |") == len(list(needle_tables(found.needles)))
    assert "| 64 | 8 of 10 = 80.0% | 7 of 8 = 87.5%" in printed


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "eval.json"
    path.write_text("{}")
    with pytest.raises(SystemExit):
        main([str(path)])
    assert "is not an eval.json of this version" in capsys.readouterr().err
