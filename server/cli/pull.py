"""`dsa pull`: fetches a model and says where it is."""

from __future__ import annotations

from typing import Annotated

import typer

from server.cli.options import fail
from server.hub.models import DEFAULT_MODEL, ModelError, resolve


def pull(
    model: Annotated[
        str, typer.Argument(help="A name as dsa serve takes it, also org/name of the Hugging Face hub.")
    ] = DEFAULT_MODEL,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the files again, even if they were before.")
    ] = False,
) -> None:
    """Fetch a model into the cache, so that `dsa serve` starts without a network."""
    from server.hub.stages import Stages

    try:
        with Stages() as stages:
            files = resolve(model, report=stages, rehash=verify)
    except ModelError as error:
        fail(error)
    print(f"{files.name}: {files.weights}" + (f" (license: {files.license})" if files.license else ""))
