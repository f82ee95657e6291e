"""A part of a tensor, to be read without the rest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slice:
    """Indices `start` to `stop` - 1 of a matrix along `dim` (0: rows, 1: columns)."""

    dim: int
    start: int
    stop: int
