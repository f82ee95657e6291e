"""The figures of `python -m benchmarks.gpu` as tables in Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def tables(found: Row) -> str:
    """Write the tables of the report that `benchmarks.gpu.__main__` made; stages without figures are told."""
    return "\n".join(line for part in _parts(found) for line in (*part, "")).rstrip() + "\n"


def _parts(found: Row) -> Iterator[list[str]]:
    about = found["about"]
    yield [f"# {about['device']}: torch {about['torch']}, CUDA {about['cuda']}, Triton {about['triton']}"]
    yield table(
        [{name: stage[name] for name in ("name", "state", "seconds", "why")} for stage in found["stages"]]
    )
    results = {stage["name"]: stage["result"] for stage in found["stages"] if stage["result"]}
    if doctor := results.get("doctor"):
        yield ["## Conformance and rates"]
        kept = ("backend", "device", "passed", "checks")
        yield table([{name: one[name] for name in kept} for one in doctor["conformance"]])
        yield table([{"device": device} | _per_second(rates) for device, rates in doctor["rates"].items()])
    if kernels := results.get("kernels"):
        yield ["## Kernels over rows: µs a call", *_figures(_of_kernels(kernels))]
    if pointwise := results.get("pointwise"):
        yield ["## Pointwise kernels and sampling: µs a call", *_figures(_of_pointwise(pointwise))]
    if step := results.get("step"):
        yield ["## Steps of the engine"]
        for part in ("decode", "prompt"):
            if rows := step.get(part):
                yield table(rows)
        if equality := step.get("equality"):
            yield table([
                {"the same tokens": name, "prompts": one["prompts"], "equal": one["equal"]} for name, one in equality.items()
            ])  # fmt: skip
    for name, title in (("http", "Over HTTP"), ("shape", "Sparse beside dense at a larger shape")):
        if result := results.get(name):
            yield [f"## {title}"]
            yield from _any(result)


def _of_kernels(found: Row) -> list[Row]:
    return [
        {"case": one["name"], "us": one["us"], "floor": one["floor"], "torch": one["plain"]}
        for one in found["figures"]
    ]


def _of_pointwise(found: Row) -> list[Row]:
    return [
        {
            "case": f"{one['model']} {one['operation']} {one['rows']} rows", "us": one["us"], "floor": one["floor_us"],
            "torch": one["torch_us"],
        }
        for one in found["operations"]
    ]  # fmt: skip


def _figures(rows: Sequence[Row]) -> list[str]:
    more = [
        row
        | {
            "x floor": row["us"] / row["floor"],
            "torch / ours": row["torch"] / row["us"] if row["torch"] else None,
        }
        for row in rows
    ]
    return ["", *table(more)]


def _per_second(rates: Row) -> Row:
    return {
        {"copy": "copy GB/s", "read": "read GB/s"}.get(name, f"{name} TFLOP/s"): rate / (1e9 if name in ("copy", "read") else 1e12)
        for name, rate in rates.items()
    }  # fmt: skip


def _any(found: Row) -> Iterator[list[str]]:
    """Tables of what has lists of rows, and one of the single values."""
    single = {name: value for name, value in found.items() if not isinstance(value, list | dict)}
    if single:
        yield table([single])
    for name, value in found.items():
        rows = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else []
        if rows and all(isinstance(row, dict) for row in rows):
            if isinstance(value, dict):
                rows = [{"": key} | row for key, row in value.items()]
            yield [f"### {name}", "", *table(rows)]
        elif isinstance(value, dict) and value:
            yield [f"### {name}", "", *table([value])]


def table(rows: Sequence[Row]) -> list[str]:
    """Make a table with a column for every name in any of the rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([_cell(row.get(name)) for name in names] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


MOST_BARS = 40


def draw(found: Row, path: Path) -> bool:
    """Draw the kernels' times over their floors, and tokens a second of decodes.

    Args:
        found: the report
        path: the PNG file to write

    Returns:
        False if the report has nothing to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results = {stage["name"]: stage["result"] for stage in found["stages"] if stage["result"]}
    figures = _of_kernels(results["kernels"]) if "kernels" in results else []
    decodes = results.get("step", {}).get("decode", [])
    shown = [bool(figures), bool(decodes)]
    if not any(shown):
        return False
    height = max(4.5, 0.19 * min(len(figures), MOST_BARS) + 1.5)
    figure, axes = plt.subplots(
        1, sum(shown), figsize=(8 * sum(shown), height), layout="constrained", squeeze=False
    )
    places = iter(axes[0])
    if figures:
        _draw_floors(next(places), figures)
    if decodes:
        _draw_decodes(next(places), decodes)
    figure.suptitle(f"{found['about']['device']}, torch {found['about']['torch']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _draw_floors(axis: Any, figures: Sequence[Row]) -> None:
    """The longest calls, which are what a step waits for: measured over floor, and plain torch over floor."""
    chosen = sorted(figures, key=lambda one: -one["floor"])[:MOST_BARS][::-1]
    names = [one["case"] for one in chosen]
    axis.barh(names, [one["us"] / one["floor"] for one in chosen], color="tab:blue", label="this engine")
    compared = [(one["case"], one["torch"] / one["floor"]) for one in chosen if one["torch"]]
    if compared:
        axis.plot([ratio for _, ratio in compared], [name for name, _ in compared], "k|", markersize=9, label="plain torch")  # fmt: skip
    axis.axvline(1, color="tab:red", linewidth=1, label="floor")
    axis.set_xscale("log")
    axis.set_xlabel("time over floor")
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(loc="lower right")


def _draw_decodes(axis: Any, decodes: Sequence[Row]) -> None:
    """Tokens a second, sparse beside dense."""
    cases = list(dict.fromkeys((one["streams"], one["context"]) for one in decodes))
    kinds = list(dict.fromkeys(one["attention"] for one in decodes))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        speeds = {
            (one["streams"], one["context"]): one["tokens_s"] for one in decodes if one["attention"] == kind
        }
        at = [place + number * width for place, case in enumerate(cases) if case in speeds]
        bars = axis.bar(
            at, [speeds[case] for case in cases if case in speeds], width, label=kind, align="edge"
        )
        axis.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    labels = [f"{streams} x {context:,}" for streams, context in cases]
    axis.set_xticks([place + 0.4 for place in range(len(cases))], labels, rotation=20)
    axis.set_yscale("log")
    axis.set_ylabel("decoded tokens a second in the engine")
    axis.set_xlabel("streams x context")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
