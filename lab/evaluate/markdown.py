"""The tables of an evaluation in Markdown, for a model card: `python -m lab.evaluate.markdown eval.json`, or OUT/eval.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.table import Table
from rich.text import Text

from lab.evaluate.report import tables
from lab.evaluate.results import EvalResults


def written(results: EvalResults, index_top_ks: Sequence[int]) -> str:
    """Write the tables of all parts that are done."""
    return "\n".join(map(markdown, tables(results, index_top_ks)))


def markdown(table: Table) -> str:
    """Write one table: its title in bold, the cells without colours, its caption below."""
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    head = [_plain(column.header) for column in table.columns]
    marks = ["--:" if column.justify == "right" else "---" for column in table.columns]
    lines = [f"**{_plain(table.title)}**", ""] if table.title else []
    lines += [_row(head), _row(marks), *map(_row, zip(*columns, strict=True))]
    if table.caption:
        lines += ["", f"{_plain(table.caption)}."]
    return "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(cell: object) -> str:
    """The text of a cell, without rich's markup."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell or ""))
    return text.plain.replace("|", "\\|")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a file; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lab.evaluate.markdown", description="Print the tables of an eval.json in Markdown."
    )
    parser.add_argument("file", type=Path, help="eval.json")
    file: Path = parser.parse_args(arguments).file
    try:
        results = msgspec.json.decode(file.read_bytes(), type=EvalResults)
    except (OSError, msgspec.DecodeError) as error:
        parser.error(f"{file} is not an eval.json of this version: {error}")
    sys.stdout.write(written(results, results.settings["top_k"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
