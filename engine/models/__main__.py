"""`python -m engine.models`: says whether the engine serves a model, before its weights are there.

It is a program because the answer needs the families, which import torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint.gguf import ARCHITECTURES
from engine.checkpoint.quantisation import check_quantisation
from engine.checkpoint.safetensors import read_object
from engine.errors import CheckpointError
from engine.models import read_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if the model is served; else print one sentence and return 1."""
    parser = argparse.ArgumentParser(prog="python -m engine.models", description=__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", type=Path, help="a config.json")
    which.add_argument("--gguf", help="general.architecture of a GGUF file")
    parser.add_argument("--name", required=True, help="what messages call it")
    given = parser.parse_args(arguments)
    if given.gguf is not None:
        if given.gguf in ARCHITECTURES:
            return 0
        known = ", ".join(sorted(ARCHITECTURES))
        sys.stdout.write(
            f"{given.name} has architecture {given.gguf!r}, which is not supported; supported: {known}\n"
        )
        return 1
    try:
        raw = read_object(given.config)
        check_quantisation(raw, given.name)
        read_config(raw, given.name)
    except CheckpointError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
