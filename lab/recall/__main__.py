"""The command line of `dsa recall`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lab.tool import (
    CorpusFlag,
    DeviceFlag,
    DtypeFlag,
    ModelFlag,
    OverlayFlag,
    find,
    numbers,
    one_of,
    program,
    start,
)
from server.hub.models import DEFAULT_MODEL

app = program()


@app.command()
def recall(
    corpus: CorpusFlag,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.")],
    model: ModelFlag = DEFAULT_MODEL,
    overlay: OverlayFlag = None,
    top_k: Annotated[
        str, typer.Option(metavar="N,N", help="How many earlier tokens each token attends to.")
    ] = "256,512",
    device: DeviceFlag = "auto",
    dtype: DtypeFlag = "auto",
    per_kind: Annotated[int, typer.Option(help="Held-out texts of each kind.", min=1)] = 4,
    rows: Annotated[int, typer.Option(help="Rows to measure in each text; 0 is all.", min=0)] = 512,
) -> None:
    """Measure how much of dense attention an indexer captures.

    For comparison it also measures the best possible selection and a sliding
    window. dsa eval measures the same as one of its parts.
    """
    top_ks = numbers("--top-k", top_k, "numbers of tokens, such as 256,512")
    one_of("--dtype", dtype)
    files = find(model, overlay)
    from lab.recall.run import run

    found = run(files, corpus, index_top_k=top_ks, device=device, dtype=dtype, per_kind=per_kind, rows=rows)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    sys.exit(start(app, "recall"))
