"""Makes the text about the cost curve in docs/measured.md, from the file of `dsa bench curve --out docs`.

`python -m benchmarks.curve` prints the text. With `--write` it replaces the text in that file.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import msgspec

from lab.curve.measure import PHASES, growth
from lab.curve.report import HIGH, LOW, CurveReport
from lab.inspect.roofline import Phase

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "docs" / "measured.md"
CURVE = ROOT / "docs" / "curve.json"
WIDTH = 118
BEGIN, END = "<!-- curve: begin -->", "<!-- curve: end -->"


def read(path: Path = CURVE) -> CurveReport:
    """Read the results of a run."""
    return msgspec.json.decode(path.read_bytes(), type=CurveReport)


def table(report: CurveReport) -> str:
    """Make the table of both phases by position, with a paragraph that says how they were measured."""
    tokens = {phase: next(p.tokens for p in report.points if p.phase == phase) for phase in PHASES}
    time = "CPU time of one thread" if report.cpu_time else f"{report.threads} threads"
    rounds = len(report.points[0].seconds)
    made = (
        f"`{report.command}`, {report.machine}, {time}, {report.dtype}, {rounds} round{'s' * (rounds > 1)}, "
        f"torch {report.torch}, {report.price_an_hour:g} USD an hour. Prefill: {tokens['prefill']} tokens of one request "
        f"a step; decode: {tokens['decode']} requests. Seconds are a step's, USD a million tokens'."
    )
    lines = [
        *textwrap.wrap(made, WIDTH, break_on_hyphens=False),
        "",
        "| position | "
        + " | ".join(f"{phase} dense s | sparse s | dense USD | sparse USD" for phase in PHASES)
        + " |",
        "|---:|" + "---:|" * (4 * len(PHASES)),
    ]
    for position in sorted({p.position for p in report.points}):
        cells = []
        for phase in PHASES:
            mine = {p.attention: p for p in report.points if (p.phase, p.position) == (phase, position)}
            pair = [mine["dense"], mine["sparse"]]
            cells += [f"{p.token_seconds * p.tokens:.3g}" for p in pair]
            cells += [f"{p.usd(report.price_an_hour):.3g}" for p in pair]
        lines.append(f"| {position:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sentences(report: CurveReport) -> str:
    """Say in sentences what the curve shows."""
    return textwrap.fill(" ".join(_sentence(report, phase) for phase in reversed(PHASES)), WIDTH)


def _sentence(report: CurveReport, phase: Phase) -> str:
    sparse, dense = (growth(report.points, phase, name, LOW, HIGH) for name in ("sparse", "dense"))
    crossed = report.cheaper_from[phase]
    cheaper = (
        "sparse never is the cheaper one"
        if crossed is None
        else f"sparse is the cheaper one from {crossed / 1024:.1f}K tokens"
    )
    return (
        f"{phase.capitalize()} at 128K costs {sparse:.1f} times as much a token as at 8K with sparse attention, "
        f"{dense:.1f} times with dense; {cheaper}."
    )


def text_of(report: CurveReport) -> str:
    """Make the whole text: the table and what it shows."""
    return f"{table(report)}\n\n{sentences(report)}"


def put(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Replace the text between the file's markers.

    Raises:
        SystemExit: the file does not have the markers.
    """
    before, _, rest = path.read_text("utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"error: {path.name} has no {begin} with {end} after it")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main() -> None:
    """Print the text, or write it into the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/measured.md")
    options = parser.parse_args()
    report = read()
    if options.write:
        put(MEASURED, text_of(report))
    else:
        print(text_of(report))


if __name__ == "__main__":
    main()
