"""Prints the results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

from lab.evaluate.agreement import AgreementResult, Group
from lab.evaluate.equality import EqualityResult
from lab.evaluate.loss import LossResult, LossRow
from lab.evaluate.needles import NeedlesResult, Share, grid
from lab.evaluate.results import EvalResults, RecallResult
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


def tables(results: EvalResults, index_top_ks: Sequence[int]) -> Iterator[RenderableType]:
    """Make the tables of all parts that are done."""
    if results.loss is not None:
        yield loss_table(results.loss, index_top_ks)
    if results.needles is not None:
        yield from needle_tables(results.needles)
    if results.agreement is not None:
        yield agreement_table(results.agreement)
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
        ["dense finds", "sparse finds", "kept of dense's", "found beyond"],
    )
    for k in result.retention:
        retention, interval = result.retention[k], result.retention[k].interval
        between = "" if interval is None else f" (95 %: {interval.low:.1%} to {interval.high:.1%})"
        kept.add_row(
            k,
            _both(result.accuracy["dense"]["all"]),
            _both(result.accuracy[k]["all"]),
            _both(retention) + between,
            _both(result.gained[k]),
        )
    yield kept


def _count(share: Share) -> str:
    return f"{share.right}/{share.of}"


def _percent(share: Share) -> str:
    return "-" if share.value is None else f"{share.value:.0%}"


def _both(share: Share) -> str:
    return f"{share.right} of {share.of}" + ("" if share.value is None else f" = {share.value:.1%}")


def agreement_table(result: AgreementResult) -> Table:
    """Make the table of free and forced agreement with dense. Its first row is the agreement of dense with itself."""
    table = _table(
        f"greedy answers of up to {result.answer_tokens} tokens, compared with dense",
        "attention",
        ["prompts", "same answer", "parts at token (median)", "same best token, forced"],
    )
    table.add_row("dense again (the floor)", *_agreement(result.groups["dense"]["all"]))
    for k in (name for name in result.groups if name != "dense"):
        for name, text in (("longer", f"longer than {k}"), ("within", f"within {k}")):
            table.add_row(f"sparse {k}, {text}", *_agreement(result.groups[k][name]))
    notes = ["longer: prompt and answer together; what is within top_k agrees but for rounding"]
    if result.skipped:
        notes.append(f"{result.skipped} prompts leave no room for an answer and were not asked")
    table.caption = "; ".join(notes)
    return table


def _agreement(group: Group) -> tuple[str, str, str, str]:
    same = Share(right=group.same, of=group.prompts)
    forced = Share(right=group.forced, of=group.tokens)
    parted = "-" if group.median_parted is None else f"{group.median_parted:g}"
    return f"{group.prompts}", _both(same), parted, _both(forced)


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
