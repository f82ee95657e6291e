"""The command line of `dsa doctor`."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from lab.tool import program, start

app = program()


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    conformance: Annotated[
        bool, typer.Option("--conformance/--no-conformance", help="Check the kernels.")
    ] = True,
    rates: Annotated[bool, typer.Option("--rates/--no-rates", help="Measure bandwidth and products.")] = True,
) -> None:
    """Say what this machine has, which kernels pass here, how fast it is, and what is missing.

    It lists devices, driver and versions, checks every kernel backend against its
    definition, and measures memory bandwidth and matrix products of the CPU and of
    each GPU. It takes less than a minute; nothing else should run meanwhile. The
    exit status is 1 if the backend that dsa serve would choose does not pass.
    """
    from rich.console import Console

    from lab.doctor.report import show
    from lab.doctor.run import examination
    from server.hub.stages import Stages

    with Stages(quiet_seconds=5.0) as stages:
        found = examination(stages, conformance=conformance, measured=rates)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        show(found, Console())
    if found["passed"] is False:
        raise typer.Exit(1)


if __name__ == "__main__":
    sys.exit(start(app, "doctor"))
