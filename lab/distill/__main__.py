"""The command line of `dsa distill`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from lab.distill.recipe import EXAMPLE, Recipe
from lab.tool import CorpusFlag, ModelFlag, fail, find, one_of, program, start

app = program()
_INDEXER, _RUN = "The indexer", "The run"
_FIELDS = "; ".join(f"{name} {json.dumps(value)}" for name, value in msgspec.to_builtins(Recipe()).items())
_EPILOG = f"The recipe's fields and their defaults: {_FIELDS}"


@app.command(epilog=_EPILOG.replace("[", "\\["))
def distill(
    model: ModelFlag,
    corpus: CorpusFlag,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for the results. An unfinished run of the same settings in it continues.",
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            rich_help_panel=_RUN,
            show_default="the fields' defaults",
            help=f"How to train, as JSON, such as '{EXAMPLE}'. All fields are below.",
        ),
    ] = "{}",
    start_from: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=_RUN,
            show_default="random weights",
            help="An indexer of this model to start from.",
        ),
    ] = None,
    drop_adapter: Annotated[
        bool,
        typer.Option(
            "--drop-adapter",
            rich_help_panel=_RUN,
            help="Start from the indexers of --start-from alone, without the adapter in that file.",
        ),
    ] = False,
    until: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_RUN, help="Stop after this many steps; the same command without it goes on."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_RUN,
            min=0.1,
            show_default="the recipe's steps",
            help="Scale the dense and sparse steps so that they take so long; a few of them are timed first.",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(rich_help_panel=_RUN, help="Where to compute: auto, cpu, cuda or cuda:N.")
    ] = "auto",
    devices: Annotated[
        int,
        typer.Option(
            rich_help_panel=_RUN,
            min=1,
            help="How many GPUs train together; each takes its share of a step's sequences. Without a GPU: processes.",
        ),
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(rich_help_panel=_RUN, help="Number format of the model: auto, float32 or bfloat16."),
    ] = "auto",
    evaluate_every: Annotated[
        int,
        typer.Option(rich_help_panel=_RUN, help="Steps between evaluations; 0 evaluates only at the end."),
    ] = 0,
    evaluate_kind: Annotated[
        int,
        typer.Option(
            rich_help_panel=_RUN, help="Held-out texts of each kind in the last evaluation; 0 is none."
        ),
    ] = 3,
    heads: Annotated[
        int | None,
        typer.Option(rich_help_panel=_INDEXER, help="Heads in each layer.", show_default="8", min=1),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(rich_help_panel=_INDEXER, help="Numbers in each head.", show_default="64", min=1),
    ] = None,
    rope: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_INDEXER,
            help="How many of these are rotated by position.",
            show_default="32",
            min=1,
        ),
    ] = None,
    default_top_k: Annotated[
        int,
        typer.Option(
            rich_help_panel=_INDEXER,
            min=1,
            help="How many earlier tokens each token attends to in serving, if a request does not say it.",
        ),
    ] = 512,
) -> None:
    """Train the lightning indexer that makes a dense model sparse.

    In each layer an indexer learns which earlier tokens the model's own
    attention looks at. The model itself does not change. The result is a small
    file, OUT/indexer.safetensors, for dsa serve --overlay.

    Training needs matplotlib (the extra "train"). Without a GPU it takes long.
    Ctrl-C stops after the current step; the same command goes on from there.
    """
    one_of("--dtype", dtype)
    weights = find(model).weights
    if not (corpus / "manifest.json").is_file():
        build = f"dsa corpus --out {shlex.quote(str(corpus))} --model {shlex.quote(str(weights))}"
        fail(f"{corpus} holds no corpus; build one: {build}", 1)
    from lab.distill.run import DistillPlan, run

    plan = DistillPlan(
        weights=weights, corpus=corpus, out=out, recipe=recipe, start_from=start_from, until=until, minutes=minutes, drop_adapter=drop_adapter,
        device=device, devices=devices,
        dtype=dtype, evaluate_every=evaluate_every, evaluate_kind=evaluate_kind, heads=heads, dim=dim, rope=rope,
        default_top_k=default_top_k,
    )  # fmt: skip
    raise typer.Exit(run(plan))


if __name__ == "__main__":
    sys.exit(start(app, "distill"))
