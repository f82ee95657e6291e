"""The command line of `dsa eval`."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lab.evaluate.results import PARTS
from lab.tool import CorpusFlag, ModelFlag, ThreadsFlag, fail, find, numbers, one_of, program, start
from server.hub.models import DEFAULT_MODEL

app = program()
_WHAT, _HOW = "What is measured", "How"
_TOKENS = "numbers of tokens, such as 256,512"


@app.command("eval")
def evaluate(
    corpus: CorpusFlag,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for eval.json, eval.md and pictures. Parts in it with the same settings are kept.",
        ),
    ],
    model: ModelFlag = DEFAULT_MODEL,
    top_k: Annotated[
        str, typer.Option(metavar="N,N", help="Values to compare with dense.", rich_help_panel=_WHAT)
    ] = "256,512",
    answer_top_k: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Values for answers and needles, which take longest.",
            show_default="the values of --top-k",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PART,PART",
            help=f"Measure only these, even if done: {', '.join(PARTS)}.",
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
    url: Annotated[
        str | None,
        typer.Option(
            help="A running server of MODEL for equality, instead of one that is started.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.", rich_help_panel=_HOW)
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Number format: auto, float32 or bfloat16.", rich_help_panel=_HOW)
    ] = "auto",
    threads: ThreadsFlag = None,
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
    """Say how faithful sparse attention is to dense attention.

    First come greedy answers to long prompts: how often sparse predicts what
    dense predicts, and how its own answers differ. Then needles in haystacks
    that dense finds, held-out loss, exactness of short contexts, and how much
    of dense attention the indexer captures. A table says which bars are
    missed; the exit status is 0 even then.

    With a GPU it takes minutes. Without one use --limit, such as --limit 12.
    """
    top_ks = numbers("--top-k", top_k, _TOKENS)
    answer_top_ks = top_ks if answer_top_k is None else numbers("--answer-top-k", answer_top_k, _TOKENS)
    for number in answer_top_ks:
        if number not in top_ks:
            fail(f"--answer-top-k names {number}, which is not among --top-k: {', '.join(map(str, top_ks))}")
    chosen = None if only is None else tuple(part.strip() for part in only.split(","))
    for part in chosen or ():
        if part not in PARTS:
            fail(f"--only names {part!r}; expected some of {', '.join(PARTS)}")
    one_of("--dtype", dtype)
    if url is not None and server_flags:
        fail("--server-flags are for a server that is started, but --url names a running one")
    files = find(model, overlay)
    from lab.evaluate.run import EvalPlan
    from lab.evaluate.run import evaluate as run

    plan = EvalPlan(
        files=files, corpus=corpus, out=out, url=url, index_top_k=top_ks, answer_top_k=answer_top_ks, only=chosen,
        per_kind=per_kind or None, limit=limit, device=device, dtype=dtype, threads=threads,
        server_flags=tuple(shlex.split(server_flags)),
    )  # fmt: skip
    try:
        run(plan, Console())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


if __name__ == "__main__":
    sys.exit(start(app, "eval"))
