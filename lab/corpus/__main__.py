"""`python -m lab.corpus`: build the corpus with a progress bar and say what it holds."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lab.corpus.build import build_corpus
from lab.corpus.fetch import FetchError
from lab.corpus.manifest import Manifest
from lab.corpus.sources import SOURCES
from server.hub.models import ModelError, resolve
from server.text.tokenizer import TokenizerError, load_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 where a package or the tokenizer is missing."""
    parser = argparse.ArgumentParser("lab.corpus", description="Build the training corpus of the indexer.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--model",
        required=True,
        help="whose tokenizer to use: a name that dsa can fetch, a .gguf file, or a folder",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (%(default)s)")
    parser.add_argument("--tokens", type=int, default=26_000_000, help="training tokens (%(default)s)")
    parser.add_argument("--heldout-tokens", type=int, default=400_000, help="held-out tokens (%(default)s)")
    parser.add_argument("--cache", type=Path, help="folder for fetched packages (OUT/cache)")
    parser.add_argument("--skip", nargs="*", default=[], metavar="NAME", help="sources to go without")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    unknown = set(options.skip) - {source.name for source in SOURCES}
    if unknown:
        parser.error(f"there is no source named {', '.join(sorted(unknown))}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("starting", total=None)
            manifest = build_corpus(
                options.out,
                load_tokenizer(resolve(options.model).weights),
                options.seed,
                options.tokens,
                heldout_tokens=options.heldout_tokens,
                sources=[source for source in SOURCES if source.name not in options.skip],
                cache=options.cache,
                report=lambda what, done, total: progress.update(
                    task, description=what, completed=done, total=total
                ),
            )
            progress.update(task, description="done", completed=1, total=1)
    except (FetchError, ModelError, TokenizerError, ValueError) as error:
        console.print(f"The corpus was not built: {error}.", style="red", markup=False)
        return 1
    Console().print(summary(manifest))
    return 0


def summary(manifest: Manifest) -> Table:
    """Tokens, sequences and long sequences by split and kind."""
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
    sys.exit(main())
