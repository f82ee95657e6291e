"""`dsa distill`: hands over to the trainer, which is a program of its own because it imports torch."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

DEFAULTS: dict[str, object] = {
    "heads": 8, "dim": 64, "rope": 32, "default_top_k": 512, "device": "auto", "dtype": "auto",
    "evaluate_every": 0, "evaluate_kind": 3,
}  # fmt: skip
"""What the trainer does where a flag is not given: for the help alone, the trainer has its own."""

_INDEXER, _RUN = "The indexer", "The run"


def _flag(panel: str, text: str, name: str, metavar: str | None = None) -> Any:
    """A flag that is passed on only if it was given."""
    default = f" [dim]\\[default: {DEFAULTS[name]}][/dim]" if name in DEFAULTS else ""
    return typer.Option(help=text + default, rich_help_panel=panel, metavar=metavar, show_default=False)


def distill(
    model: Annotated[
        str,
        typer.Argument(
            help="The dense model: a name that dsa can fetch, a .gguf file, or a folder with config.json "
            "and *.safetensors."
        ),
    ],
    corpus: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="The text to learn from: a folder made by python -m lab.corpus --out DIR --model MODEL.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where the results go. If it holds an unfinished run of the same settings, that goes on.",
        ),
    ],
    recipe: Annotated[
        str | None,
        _flag(
            _RUN,
            "How to train, as JSON, such as '{\"warmup_steps\": 50}'. All fields: python -m lab.distill --help.",
            "recipe",
            "JSON",
        ),
    ] = None,
    start_from: Annotated[
        Path | None,
        _flag(
            _RUN, "An indexer of this model to go on from, instead of random weights.", "start_from", "FILE"
        ),
    ] = None,
    until: Annotated[
        int | None, _flag(_RUN, "Stop after this many steps; the same command without it goes on.", "until")
    ] = None,
    device: Annotated[
        str | None, _flag(_RUN, "Where to compute: auto, cpu, cuda or cuda:N.", "device")
    ] = None,
    dtype: Annotated[
        str | None, _flag(_RUN, "Number format of the model: auto, float32 or bfloat16.", "dtype")
    ] = None,
    evaluate_every: Annotated[
        int | None, _flag(_RUN, "Steps between evaluations; 0 is only at the end.", "evaluate_every")
    ] = None,
    evaluate_kind: Annotated[
        int | None,
        _flag(_RUN, "Held-out texts of each kind in the last evaluation; 0 is none.", "evaluate_kind"),
    ] = None,
    heads: Annotated[int | None, _flag(_INDEXER, "Heads in each layer.", "heads")] = None,
    dim: Annotated[int | None, _flag(_INDEXER, "Numbers in each head.", "dim")] = None,
    rope: Annotated[int | None, _flag(_INDEXER, "How many of those know their position.", "rope")] = None,
    default_top_k: Annotated[
        int | None,
        _flag(
            _INDEXER,
            "How many earlier tokens each token attends to when served, where a request does not say.",
            "default_top_k",
        ),
    ] = None,
) -> None:
    """Train the lightning indexer that makes a dense model sparse.

    An indexer learns, layer by layer, which earlier tokens the model's own
    attention looks at; the model itself stays as it is. The result is a small
    file, OUT/indexer.safetensors, for dsa serve --overlay.

    Needs matplotlib (the extra "train"), and a GPU unless there is much time.
    Ctrl-C stops after the current step; the same command goes on from there.
    """
    options = {
        name: value
        for name, value in locals().items()
        if name not in ("model", "corpus", "out") and value is not None
    }
    from server.hub.models import ModelError, resolve
    from server.hub.stages import Stages

    try:
        with Stages() as stages:
            weights = resolve(model, report=stages).weights
    except ModelError as error:
        _fail(str(error))
    if not (corpus / "manifest.json").is_file():
        build = f"python -m lab.corpus --out {shlex.quote(str(corpus))} --model {shlex.quote(str(weights))}"
        _fail(f"{corpus} holds no corpus; build one: {build}")
    command = [sys.executable, "-m", "lab.distill"]
    for name, value in {"weights": weights, "corpus": corpus, "out": out, **options}.items():
        command.append(f"--{name.replace('_', '-')}={value}")
    # The trainer takes this process's place: terminal, signals and exit status are its own.
    os.execv(command[0], command)  # noqa: S606 - an argument list that is written here


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1)
