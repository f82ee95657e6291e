"""`dsa eval`: reads the flags and hands over to `lab.evaluate`."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from server.settings import Settings

_DEFAULTS = Settings()
_WHAT, _HOW = "What is measured", "How"


def evaluate(
    corpus: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="What to ask: a folder made by python -m lab.corpus --out DIR --model MODEL.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where eval.json and the pictures go. Parts that are there, of the same settings, are kept.",
        ),
    ],
    model: Annotated[
        str,
        typer.Argument(help="A name that dsa can fetch, a .gguf file, or a folder."),
    ] = _DEFAULTS.model,
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server of MODEL to ask, instead of one that is started.", rich_help_panel=_HOW
        ),
    ] = None,
    top_k: Annotated[
        str, typer.Option(metavar="N,N", help="What to compare with dense.", rich_help_panel=_WHAT)
    ] = "256,512",
    answer_top_k: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Those for needles and agreement, which take longest.",
            show_default="those of --top-k",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help="Measure only these, anew: loss, needles, agreement, equality, recall.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    per_kind: Annotated[
        int, typer.Option(help="Held-out texts of each kind; 0 is all.", min=0, rich_help_panel=_WHAT)
    ] = 16,
    limit: Annotated[
        int | None,
        typer.Option(
            help="For a quick look: at most so many texts of a kind, needles and prompts.",
            min=1,
            rich_help_panel=_WHAT,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(help="Requests at a time.", min=1, max=256, rich_help_panel=_HOW)
    ] = 16,
    device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.", rich_help_panel=_HOW)
    ] = _DEFAULTS.device,
    dtype: Annotated[
        str, typer.Option(help="Number format: auto, float32 or bfloat16.", rich_help_panel=_HOW)
    ] = str(_DEFAULTS.dtype),
    overlay: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The indexer to measure.",
            show_default="the model's own",
            rich_help_panel=_HOW,
        ),
    ] = None,
    server_flags: Annotated[
        str,
        typer.Option(
            metavar="'--FLAG VALUE'",
            help="More flags for the server that is started, such as '--kv-cache-memory 8GiB'.",
            rich_help_panel=_HOW,
        ),
    ] = "",
) -> None:
    """Compare sparse with dense attention, side by side on one server.

    Held-out loss, needles in haystacks, greedy answers, exactness of short
    contexts, and how much of dense attention the indexer captures. A bar that
    is missed is said; the exit status is 0 all the same.
    """
    from rich.console import Console

    from lab.evaluate.client import EvaluationError
    from lab.evaluate.material import MaterialError
    from lab.evaluate.results import PARTS
    from lab.evaluate.run import Plan
    from lab.evaluate.run import evaluate as run
    from server.chat import PromptError
    from server.hub.models import ModelError, resolve
    from server.hub.stages import Stages
    from server.text.tokenizer import TokenizerError

    top_ks = _numbers("--top-k", top_k)
    answer_top_ks = top_ks if answer_top_k is None else _numbers("--answer-top-k", answer_top_k)
    for number in answer_top_ks:
        if number not in top_ks:
            _fail(
                f"--answer-top-k names {number}, which is not among --top-k: {', '.join(map(str, top_ks))}", 2
            )
    chosen = None if only is None else tuple(part.strip() for part in only.split(","))
    for part in chosen or ():
        if part not in PARTS:
            _fail(f"--only names {part!r}; expected some of {', '.join(PARTS)}", 2)
    if dtype not in ("auto", "float32", "bfloat16"):
        _fail(f"--dtype is {dtype!r}; expected one of auto, float32, bfloat16", 2)
    if url is not None and server_flags:
        _fail("--server-flags are for a server that is started, but --url names a running one", 2)
    try:
        with Stages() as stages:
            files = resolve(model, overlay=overlay, report=stages)
        plan = Plan(
            files=files,
            corpus=corpus,
            out=out,
            url=url,
            top_k=top_ks,
            answer_top_k=answer_top_ks,
            only=chosen,
            per_kind=per_kind or None,
            limit=limit,
            concurrency=concurrency,
            device=device,
            dtype=dtype,
            server_flags=tuple(shlex.split(server_flags)),
        )
        run(plan, Console())
    except (ModelError, EvaluationError, MaterialError, TokenizerError, PromptError, OSError) as error:
        _fail(str(error))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def _numbers(option: str, text: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isdigit() and int(number) for number in numbers):
        _fail(f"{option} is {text!r}; expected numbers of tokens, such as 256,512", 2)
    return tuple(dict.fromkeys(map(int, numbers)))


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
