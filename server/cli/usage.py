"""`dsa usage`: sums of the usage ledger."""

from __future__ import annotations

import csv
import json
import os
import sys
from typing import Annotated, Literal

import typer

from server.cli.options import fail


def _usd(nanos: int) -> str:
    sign, nanos = ("-" if nanos < 0 else ""), abs(nanos)
    return f"{sign}{nanos // 10**9}.{nanos % 10**9:09d}"


def usage(
    by: Annotated[
        str, typer.Option(help="Columns to sum by, of key, model, day, outcome, endpoint, price_version.")
    ] = "key,model,day",
    since: Annotated[str | None, typer.Option(metavar="DAY", help="First day, as 2026-11-01, UTC.")] = None,
    until: Annotated[str | None, typer.Option(metavar="DAY", help="Last day, UTC.")] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL", help="The ledger.", show_default="$DSA_LEDGER, else where dsa serve keeps it"
        ),
    ] = None,
    format: Annotated[Literal["table", "csv", "json"], typer.Option(help="How to print.")] = "table",
) -> None:
    """Say what requests used and cost, from the usage ledger. Amounts are USD; JSON and CSV have nano-dollars."""
    from server.money.journal import rows_in
    from server.money.ledger import journal_folder
    from server.money.rows import DIMENSIONS, SUMS, LedgerError, open_database, report
    from server.settings import default_ledger

    columns = [name.strip() for name in by.split(",") if name.strip()]
    unknown = [name for name in columns if name not in DIMENSIONS]
    if unknown or not columns:
        fail(f"--by is {by!r}; expected some of {', '.join(DIMENSIONS)}", 2)
    try:
        where = ledger or os.environ.get("DSA_LEDGER") or default_ledger()
        rows = report(open_database(where, create=False), columns, since, until)
        folder = journal_folder(where)
        if folder is not None and (waiting := rows_in(folder)):
            note = f"up to {waiting} more rows wait in {folder}; a server that runs, or the next one, moves them here"
            typer.echo(note, err=True)
    except LedgerError as error:
        fail(error)
    names = [*columns, "requests", *SUMS]
    if format == "json":
        typer.echo(json.dumps(rows, indent=2))
    elif format == "csv":
        writer = csv.DictWriter(sys.stdout, names)
        writer.writeheader()
        writer.writerows(rows)
    else:
        from rich.console import Console
        from rich.table import Table

        shown = [name.replace("_nanos", " USD").replace("device_ns", "device s") for name in names]
        table = Table(*(name.replace("_", " ") for name in shown))
        for row in rows:
            table.add_row(
                *(
                    _usd(row[name]) if name.endswith("_nanos")
                    else f"{row[name] / 1e9:.3f}" if name == "device_ns"
                    else str(row[name])
                    for name in names
                )
            )  # fmt: skip
        console = Console()
        # A figure that is cut is worse than a line that wraps: no narrower than the table needs to be.
        console.width = max(
            console.width, console.measure(table, options=console.options.update(max_width=400)).maximum
        )
        console.print(table)
