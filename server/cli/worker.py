"""`dsa worker`: starts the engine's node, which is a separate program because it imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.options import become, fail


def worker(
    model: Annotated[
        str, typer.Argument(help="The leader's model, where it is on this host.", show_default=False)
    ],
    leader: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", help="As the leader's own --leader.", envvar="DSA_LEADER", show_default=False
        ),
    ],
    overlay: Annotated[
        Path | None,
        typer.Option(
            help="The leader's overlay, if it has one.", metavar="FILE", show_default="the model's own"
        ),
    ] = None,
    node_secret_file: Annotated[
        Path | None,
        typer.Option(
            help="The leader's secret, in a file of this host; needed unless the leader is this host.",
            metavar="FILE",
            envvar="DSA_NODE_SECRET_FILE",
            show_default="none",
        ),
    ] = None,
    wait_seconds: Annotated[
        float, typer.Option(help="How long to look for a leader that cannot be reached.", min=0)
    ] = 600,
) -> None:
    """Lend this host's devices to a dsa serve on another host.

    The leader runs dsa serve MODEL --tensor-parallel N --nodes M --leader
    HOST:PORT, each other node dsa worker MODEL --leader HOST:PORT, and all of them
    --node-secret-file with the same secret: N / M devices of each compute the
    model together. All settings are the leader's; versions and
    model files must be the same. When the leader's engine starts anew, this node
    joins it again.
    """
    from server.hub.models import ModelError, resolve
    from server.hub.stages import Stages

    try:
        with Stages() as stages:
            files = resolve(model, overlay=overlay, report=stages)
    except ModelError as error:
        fail(error)
    options = {
        "weights": files.weights, "overlay": files.overlay, "leader": leader, "node-secret-file": node_secret_file,
        "wait-seconds": wait_seconds,
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    become("engine.parallel.node", *given)
