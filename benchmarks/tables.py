"""Makes the tables of docs/measured.md from the JSON files that `dsa bench` wrote.

`python -m benchmarks.tables DIR` prints the tables. With `--write` they replace the tables in docs/measured.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from lab.bench.results import BenchResults, load
from lab.bench.statistics import Spread

MEASURED = Path(__file__).parents[1] / "docs" / "measured.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
SUITES = ("decode", "prefill", "concurrency", "prefix", "long", "overhead")


def tables(folder: Path) -> str:
    """Make the tables of all suites whose file is in the folder.

    Raises:
        SystemExit: the folder has no such file.
    """
    found = [load(path) for name in SUITES if (path := folder / f"{name}.json").is_file()]
    if not found:
        raise SystemExit(
            f"error: {folder} has no results of dsa bench; run python -m benchmarks.compare --out {folder}"
        )
    return "\n\n".join(_text(results) for results in found)


def _text(results: BenchResults) -> str:
    machine = results.machine
    cpus = next((server.cpus for server in results.servers if server.cpus), None)
    where = f"{machine['processor']}, servers on " + (
        "any core" if cpus is None else f"core {', '.join(map(str, cpus))}"
    )
    lines = [
        f"**{results.title}** ({results.started[:10]}, {where}, {results.settings['rounds']} rounds)",
        "",
    ]
    lines += list(_rows(results))
    if results.remarks:
        lines += ["", "; ".join(results.remarks) + "."]
    return "\n".join(lines)


def _rows(results: BenchResults) -> Iterator[str]:
    several = len(results.servers) > 1
    heads = [results.axis, "server", *(metric.heading for metric in results.metrics), "peak MiB"]
    yield _row([*heads, "× best other"] if several else heads)
    yield _row(["---:", "---", *["---:"] * (len(heads) - 2 + several)])
    first = results.metrics[0]
    for case, servers in results.figures.items():
        for i, (name, found) in enumerate(servers.items()):
            peaks = [s.peak_memory_bytes or 0 for s in results.samples if (s.case, s.server) == (case, name)]
            ratio = results.ratios.get(case, {}).get(first.name)
            yield _row(
                [
                    f"{case:,}" if i == 0 else "",
                    f"**{name}**" if name == results.own else name,
                    *(
                        _cell(found.get(metric.name), metric.digits, metric is first)
                        for metric in results.metrics
                    ),
                    f"{max(peaks) / (1 << 20):,.0f}" if any(peaks) else "-",
                    *(
                        [f"**{ratio:.2f}**" if ratio is not None and name == results.own else ""]
                        if several
                        else []
                    ),
                ]
            )


def _cell(spread: Spread | None, digits: int, quartiles: bool) -> str:
    if spread is None:
        return "-"
    around = (
        f" ({spread.low:,.{digits}f} to {spread.high:,.{digits}f})" if quartiles and spread.count > 1 else ""
    )
    return f"{spread.median:,.{digits}f}{around}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables, or write them into docs/measured.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of benchmarks.compare")
    parser.add_argument("--write", action="store_true", help="into docs/measured.md, in place of those there")
    options = parser.parse_args()
    made = tables(options.folder)
    if not options.write:
        print(made)
        return
    before, _, rest = MEASURED.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    MEASURED.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
