r"""Draws what sparse attention buys a model by context, and what it changes: speed and price, dense beside sparse, and agreement.

    python -m benchmarks.compare --model MODEL --cpus 0,1 --suites long --rounds 1 --out results
    dsa eval MODEL --corpus corpus --out agreement --only faithful
    python -m benchmarks.by_context results/long.json agreement/eval.json --out docs/by_context.png

`long.json` may also be of `dsa bench long` with any two servers: `--sparse NAME --dense NAME` say which. It prints the figures as a table in Markdown, too. One stream has the machine to itself, so a token costs the machine's price
for the time that the token takes. A prompt token's time is its share of the time to the first token of a cold prompt; an answer's
token's time is a step's, behind that prompt.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import msgspec

from lab.bench.results import BenchResults, load
from lab.bench.statistics import Spread
from lab.curve.measure import ATTENTION, Attention
from lab.evaluate.faithful import LENGTHS
from lab.evaluate.results import EvalResults

PRICE = 0.10
_COLOURS = {"dense": "tab:orange", "sparse": "tab:blue"}
_PHASES = ("prefill_rate", "decode_rate")
_NAMES = {"prefill_rate": "prompt", "decode_rate": "answer"}


class Agreement(NamedTuple):
    """How often sparse attention's likeliest token is dense's, in prompts of some lengths; 0 to 1."""

    mean_tokens: float  # of the prompts
    prompts: int
    share: float
    low: float
    high: float
    dense_again: float  # the same of dense itself, asked in another batch


def speeds(results: BenchResults, server: str, metric: str) -> dict[int, Spread]:
    """Return one server's rates by context, in tokens a second.

    Raises:
        SystemExit: the results have none of them.
    """
    found = {
        case: of[server][metric]
        for case, of in sorted(results.figures.items())
        if metric in of.get(server, {})
    }
    if not found:
        names = ", ".join(one.name for one in results.servers)
        raise SystemExit(f"error: no {metric} of a server named {server!r}; the file has {names}")
    return found


def agreements(results: EvalResults) -> list[Agreement]:
    """Collect the agreement at the default top_k by length of the prompts, the shortest first.

    Raises:
        SystemExit: the results have no such part.
    """
    found = results.faithful
    if found is None or str(results.default_top_k) not in found.rows:
        raise SystemExit(
            "error: the evaluation has no agreement at the default top_k; run it with --only faithful"
        )
    sparse, dense = found.rows[str(results.default_top_k)], found.rows["dense"]
    made = []
    for first, end in zip(LENGTHS, (*LENGTHS[1:], math.inf), strict=True):
        lengths = [one.prompt_tokens for one in found.prompts if first <= one.prompt_tokens < end]
        if not lengths:
            continue
        row, again = sparse[f"from {first}"], dense[f"from {first}"].agreement
        low, high = row.agreement_interval or (row.agreement, row.agreement)
        made.append(Agreement(statistics.mean(lengths), len(lengths), row.agreement, low, high, again))
    return made


def usd(rate: float, price: float) -> float:
    """Return the price of a million tokens, in USD, of a machine that costs `price` USD an hour and makes `rate` tokens a second."""
    return price / 3600 * 1e6 / rate


def table(results: BenchResults, names: Mapping[Attention, str], price: float) -> str:
    """Make the table of rates and prices by context, in Markdown. `names`: of the servers."""
    lines = [
        "| context | "
        + " | ".join(f"{_NAMES[phase]}: dense tok/s | sparse | dense USD a million | sparse" for phase in _PHASES)
        + " |",
        "|---:|" + "---:|" * (4 * len(_PHASES)),
    ]  # fmt: skip
    by = {(phase, name): speeds(results, names[name], phase) for phase in _PHASES for name in ATTENTION}
    for context in _contexts(by.values()):
        cells: list[str] = []
        for phase in _PHASES:
            rates = [by[phase, name][context].median for name in ATTENTION]
            cells += [f"{rate:.1f}" for rate in rates]
            cells += [f"{usd(rate, price):.2f}" for rate in rates]
        lines.append(f"| {context:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _contexts(curves: Iterable[Mapping[int, Spread]]) -> list[int]:
    """Return the contexts that all curves have: a run that was cut off has not measured all servers at the last."""
    return sorted(set[int].intersection(*map(set, curves)))


def draw(
    results: BenchResults,
    names: Mapping[Attention, str],
    found: list[Agreement],
    title: str,
    price: float,
    path: Path,
) -> None:
    """Draw speed of answers, price of prompts and answers, and agreement, and write the PNG `path`."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, cost, same) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    for name in ATTENTION:
        curve = speeds(results, names[name], "decode_rate")
        at, rates = [context / 1024 for context in curve], list(curve.values())
        speed.plot(at, [one.median for one in rates], marker="o", color=_COLOURS[name], label=name)
        lows, highs = [one.low for one in rates], [one.high for one in rates]
        speed.fill_between(at, lows, highs, color=_COLOURS[name], alpha=0.2)
        for phase, line in (("decode_rate", "-"), ("prefill_rate", "--")):
            curve = speeds(results, names[name], phase)
            cost.plot(
                [context / 1024 for context in curve], [usd(one.median, price) for one in curve.values()], line,
                marker="o", color=_COLOURS[name], label=f"{_NAMES[phase]}, {name}",
            )  # fmt: skip
    speed.set_title("tokens of an answer a second, one stream")
    cost.set_title(f"USD a million tokens, at {price:g} USD an hour")
    for axis in (speed, cost):
        axis.set_xlabel("context (K is 1024 tokens)")
        axis.set_ylim(bottom=0)
    at = [one.mean_tokens / 1024 for one in found]
    shares = [100 * one.share for one in found]
    errors = [[100 * (one.share - one.low) for one in found], [100 * (one.high - one.share) for one in found]]
    same.errorbar(at, shares, yerr=errors, marker="o", capsize=3, color=_COLOURS["sparse"], label="sparse")
    same.plot(
        at,
        [100 * one.dense_again for one in found],
        "--",
        color=_COLOURS["dense"],
        label="dense, asked again",
    )
    same.set_title("% of tokens where the likeliest is dense's")
    same.set_xlabel("mean length of the prompts (K is 1024 tokens)")
    same.set_ylim(min(90.0, *(100 * one.low for one in found)), 100.2)
    for axis in (speed, cost, same):
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bench", type=Path, help="long.json of benchmarks.compare or dsa bench")
    parser.add_argument("agreement", type=Path, help="eval.json of dsa eval")
    parser.add_argument(
        "--sparse", default="dsa", metavar="NAME", help="the sparse server in it (%(default)s)"
    )
    parser.add_argument("--dense", default="dsa dense", metavar="NAME", help="the dense one (%(default)s)")
    parser.add_argument("--price", type=float, default=PRICE, help="USD an hour of the machine (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("by_context.png"), help="the picture (%(default)s)")
    options = parser.parse_args()
    if not options.price > 0:
        parser.error("--price must be above 0")
    try:
        results = load(options.bench)
        evaluated = msgspec.json.decode(options.agreement.read_bytes(), type=EvalResults)
    except (OSError, msgspec.DecodeError) as error:
        parser.error(f"a file cannot be read: {error}")
    found = agreements(evaluated)
    names: dict[Attention, str] = {"dense": options.dense, "sparse": options.sparse}
    draw(results, names, found, _title(results, evaluated), options.price, options.out)
    print(table(results, names, options.price))
    print("\n| prompts of about | prompts | same token | dense asked again |\n|---:|---:|---:|---:|")
    for one in found:
        print(f"| {one.mean_tokens:,.0f} | {one.prompts} | {one.share:.1%} | {one.dense_again:.1%} |")


def _title(results: BenchResults, evaluated: EvalResults) -> str:
    machine: dict[str, Any] = results.machine
    cpus = next((server.cpus for server in results.servers if server.cpus), None)
    where = (
        machine["processor"]
        if cpus is None
        else f"{machine['processor']}, {len(cpus)} core{'s' * (len(cpus) > 1)}"
    )
    return (
        f"{results.settings.get('model', evaluated.settings['model'])}, top_k {evaluated.default_top_k}: {where}; "
        f"agreement on {evaluated.settings['device']}"
    )


if __name__ == "__main__":
    main()
