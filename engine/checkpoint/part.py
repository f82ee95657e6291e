"""A part of a tensor, to be read without the rest, and the place of a tensor in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Slice:
    """Indices `start` to `stop` - 1 of a matrix along `dim` (0: rows, 1: columns)."""

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor lies in a file, row after row."""

    path: Path
    offset: int  # of its first byte
    dtype: torch.dtype
    shape: tuple[int, ...]
