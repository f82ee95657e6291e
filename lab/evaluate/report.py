"""Prints the results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from lab.evaluate.code import CodeResult
from lab.evaluate.equality import EqualityResult
from lab.evaluate.faithful import FaithfulResult, FaithfulRow
from lab.evaluate.loss import LossResult, LossRow
from lab.evaluate.needles import NeedlesResult, Share, grid
from lab.evaluate.results import EvalResults, RecallResult
from lab.evaluate.statistics import Interval
from lab.evaluate.verdict import Verdict

_COLOURS = {
    "met": "green",
    "met, and the aim": "bold green",
    "missed": "bold red",
    "nothing to measure": "yellow",
}
_WORST = 5


def show(console: Console, results: EvalResults, index_top_ks: Sequence[int]) -> None:
    """Print a table for each part that is done, and the verdicts."""
    for table in tables(results, index_top_ks):
        console.print(table)


def tables(results: EvalResults, index_top_ks: Sequence[int]) -> Iterator[Table]:
    """Make the tables of all parts that are done."""
    if results.faithful is not None:
        yield from faithful_tables(results.faithful)
    if results.needles is not None:
        yield from needle_tables(results.needles)
    if results.code is not None:
        yield code_table(results.code)
    if results.loss is not None:
        yield loss_table(results.loss, index_top_ks)
    if results.equality is not None:
        yield equality_table(results.equality, index_top_ks)
    if results.recall is not None:
        yield from recall_tables(results.recall)
    if results.verdicts:
        yield verdict_table(results.verdicts)


def _table(title: str, first: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def loss_table(result: LossResult, index_top_ks: Sequence[int]) -> Table:
    """Make the table of loss by kind and position: the dense loss, and what sparse adds."""
    columns = ["tokens", "dense", *(f"sparse {k}" for k in index_top_ks)]
    table = _table(f"held-out loss beyond position {result.beyond}, nats a token", "texts", columns)
    for name, dense in result.rows["dense"].items():
        sparse = [_above(result.rows[str(k)][name]) for k in index_top_ks]
        style = "bold" if name == "all" else None
        table.add_row(name, f"{dense.tokens:,}", f"{dense.loss:.4f}", *sparse, style=style)
        if name == "all":
            table.add_section()
    table.caption = "sparse: nats above dense [95 % of resampled texts]; from P: positions P and on"
    return table


def _above(row: LossRow) -> str:
    interval = "" if row.interval is None else f" [{row.interval.low:+.4f}, {row.interval.high:+.4f}]"
    # Square brackets are markup to rich.
    return f"{row.above_dense:+.4f}{interval}".replace("[", "\\[")


def needle_tables(result: NeedlesResult) -> Iterator[Table]:
    """Make two tables: needles found in each cell of depth and context, and how many sparse keeps."""
    names = list(result.accuracy)
    contexts = sorted({needle.context for needle in result.needles})
    table = _table(
        f"needles found, {' / '.join(names)}", "depth", [f"{context} tokens" for context in contexts]
    )
    grids = [grid(result.needles, name) for name in names]
    for depth in sorted({needle.depth for needle in result.needles}):
        cells = []
        for context in contexts:
            shares = [cells_of.get((depth, context)) for cells_of in grids]
            cells.append(" / ".join("-" if share is None else _count(share) for share in shares))
        table.add_row(f"{depth:.0%}", *cells)
    table.add_section()
    table.add_row(
        "all depths",
        *(" / ".join(_percent(result.accuracy[name][str(c)]) for name in names) for c in contexts),
        style="bold",
    )
    failing = [c for c in contexts if (result.accuracy["dense"][str(c)].value or 0) < 0.5]
    notes = []
    if failing:
        notes.append(f"dense itself finds less than half at {', '.join(map(str, failing))} tokens")
    if result.skipped:
        notes.append(f"{result.skipped} needles are longer than the model's context and were not asked")
    table.caption = "; ".join(notes) or None
    yield table
    kept = _table(
        "needles, dense against sparse",
        "top_k",
        ["dense finds", "kept of dense's"],
    )
    for k in result.retention:
        retention, interval = result.retention[k], result.retention[k].interval
        between = "" if interval is None else f" (95 %: {interval.low:.1%} to {interval.high:.1%})"
        kept.add_row(
            k,
            _both(result.accuracy["dense"]["all"]),
            _both(retention) + between,
        )
    yield kept


def _count(share: Share) -> str:
    return f"{share.right}/{share.of}"


def _percent(share: Share) -> str:
    return "-" if share.value is None else f"{share.value:.0%}"


def _both(share: Share) -> str:
    return f"{share.right} of {share.of}" + ("" if share.value is None else f" = {share.value:.1%}")


def code_table(result: CodeResult) -> Table:
    """Make the table of code tasks passed by length of the prompt, and of sparse's share above dense's."""
    columns = [f"{name} tokens" if name != "all" else name for name in result.rows["dense"]]
    table = _table(
        "code tasks whose tests pass", "attention", [*columns, "above dense \\[95 % of resampled tasks]"]
    )
    for name, row in result.rows.items():
        above = ""
        if name in result.above_dense:
            share, interval = result.above_dense[name]
            above = f"{100 * share:+.1f} points"
            if interval is not None:
                above += f" \\[{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
        table.add_row(name, *(_both(share) for share in row.values()), above)
    if result.skipped:
        table.caption = f"{result.skipped} tasks leave no room for an answer and were not asked"
    return table


def faithful_tables(result: FaithfulResult) -> Iterator[Table]:
    """Make two tables: forced agreement and KL by kind and length, and what free answers are like."""
    settings = [name for name in result.rows if name != "dense"]
    columns = ["prompts", "tokens", "dense again", *(f"sparse {k}" for k in settings)]
    title = f"dense's greedy answers read again ({result.device}, {result.dtype})"
    table = _table(title, "kind or length", columns)
    for name, dense in result.rows["dense"].items():
        style = "bold" if name == "all" else None
        cells = [_forced(result.rows[k][name]) for k in settings]
        table.add_row(
            name, f"{dense.prompts}", f"{dense.tokens:,}", f"{dense.agreement:.1%}", *cells, style=style
        )
    notes = ["same likeliest token as dense [95 % of resampled prompts], KL in nats a token"]
    if result.skipped:
        notes.append(f"{result.skipped} prompts leave no room for an answer and were not asked")
    table.caption = "; ".join(notes)
    yield table
    free = _table(
        f"free greedy answers of up to {result.answer_tokens} tokens",
        "attention",
        ["mean tokens", "to dense's", "clipped", "not ended", "repeat at the end"],
    )
    for name, rows in result.rows.items():
        row = rows["all"]
        ratio = f"{row.length_ratio:.3f}{_between(row.length_interval)}"
        free.add_row(
            name,
            f"{row.length:.1f}",
            ratio,
            *(_both(Share(right=n, of=row.prompts)) for n in (row.clipped, row.unended, row.repeats)),
        )
    free.caption = "clipped: the model ended the answer within a sentence; not ended: it reached the limit"
    yield free


def _forced(row: FaithfulRow) -> str:
    return f"{row.agreement:.1%}{_between(row.agreement_interval, percent=True)}, {row.kl:.4f}"


def _between(interval: Interval | None, *, percent: bool = False) -> str:
    if interval is None:
        return ""
    kind = ".1%" if percent else ".3f"
    # Square brackets are markup to rich.
    return f" \\[{interval.low:{kind}}, {interval.high:{kind}}]"


def equality_table(result: EqualityResult, index_top_ks: Sequence[int]) -> Table:
    """Make the table of exact equality."""
    table = _table(
        "prompt and answer within top_k: log-probabilities equal to the last digit",
        "top_k",
        ["texts", "equal", "largest difference"],
    )
    for k in index_top_ks:
        own = [case for case in result.cases if case.top_k == k]
        equal = Share(right=sum(case.equal for case in own), of=len(own))
        differences = [case.largest_difference for case in own]
        largest = (
            "other tokens"
            if None in differences
            else f"{max((d for d in differences if d is not None), default=0.0):g}"
        )
        table.add_row(str(k), str(len(own)), _both(equal), largest)
    return table


def recall_tables(result: RecallResult) -> Iterator[Table]:
    """Make two tables: captured attention by position, and the worst layers."""
    ends = [*map(str, result.edges[1:]), ""]
    spans = [f"{start}-{end}" for start, end in zip(result.edges, ends, strict=True)]
    table = _table(
        f"dense attention captured ({result.rows:,} rows of {result.sequences} texts; "
        f"all: beyond position {result.beyond})",
        "selection",
        ["all", *spans, "of the best set"],
    )
    for k, own in result.top_k.items():
        for name, captured in (("indexer", own.indexer), ("oracle", own.oracle), ("window", own.window)):
            cells = ["-" if value is None else f"{value:.3f}" for value in captured.by_position]
            overlap = f"{sum(own.overlap) / len(own.overlap):.1%}" if name == "indexer" else ""
            table.add_row(f"{name} {k}", f"{captured.all:.4f}", *cells, overlap)
        table.add_section()
    table.caption = "oracle: the best that any k tokens capture; window: the latest tokens and the first four"
    yield table
    worst = _table("layers by captured attention", "top_k", ["worst layers", "widest gaps to the oracle"])
    for k, own in result.top_k.items():
        by_layer, oracle = own.indexer.by_layer, own.oracle.by_layer
        worst.add_row(
            k,
            ", ".join(f"{i} ({by_layer[i]:.3f} of {oracle[i]:.3f})" for i in own.worst_layers[:_WORST]),
            ", ".join(f"{i} ({oracle[i] - by_layer[i]:.3f})" for i in own.widest_gaps[:_WORST]),
        )
    yield worst


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Make the table of all bars and their outcomes."""
    table = _table("verdict", "what", ["measured", "bar", "aim", ""])
    for verdict in verdicts:
        colour = _COLOURS[verdict.outcome]
        table.add_row(
            verdict.what,
            "-" if verdict.value is None else f"{verdict.value:.4f}",
            f"{verdict.bar:g}",
            "" if verdict.aim is None else f"{verdict.aim:g}",
            f"[{colour}]{verdict.outcome}[/{colour}]",
        )
    return table
