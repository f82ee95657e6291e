"""The training text as the engine sees it: token ids and spans. Built by `python -m server.corpus`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import ConfigError


@dataclass(frozen=True)
class Sequence:
    """One sequence of a split."""

    start: int  # in the split's token file
    length: int
    kind: str  # prose, code, chat, ...
    focus: tuple[tuple[int, int], ...]  # spans whose rows matter most: a chat's answers


class Split:
    """A token file and where its sequences lie."""

    def __init__(self, tokens: NDArray[np.uint16], sequences: tuple[Sequence, ...]) -> None:
        self._tokens = tokens
        self.sequences = sequences

    @classmethod
    def open(cls, folder: Path, name: str) -> Split:
        """Map one split of a corpus folder into memory.

        Raises:
            ConfigError: the folder is not a corpus.
        """
        try:
            entry = json.loads((folder / "manifest.json").read_text())["splits"][name]
            tokens: NDArray[np.uint16] = np.load(folder / entry["file"], mmap_mode="r")
        except (OSError, KeyError, ValueError) as error:
            raise ConfigError(
                f"{folder} holds no corpus with a {name!r} split ({error}); build one: python -m server.corpus"
            ) from None
        sequences = tuple(
            Sequence(start=start, length=length, kind=kind, focus=tuple(map(tuple, focus)))
            for start, length, kind, _, _, focus in entry["sequences"]
        )
        return cls(tokens, sequences)

    def tokens(self, sequence: Sequence, max_length: int, device: torch.device) -> Tensor:
        """[min(length, max_length)] int64."""
        end = sequence.start + min(sequence.length, max_length)
        return torch.from_numpy(self._tokens[sequence.start : end].astype(np.int64)).to(device)

    def shuffled(self, seed: int, min_length: int) -> Iterator[Sequence]:
        """Endless passes over the sequences of at least `min_length` tokens, each in an order of its own."""
        usable = [s for s in self.sequences if s.length >= min_length]
        if not usable:
            raise ConfigError(
                f"no sequence of the corpus has {min_length} tokens; lower the minimum or build more"
            )
        for epoch in range(1 << 30):
            order = np.random.default_rng((seed, epoch)).permutation(len(usable))
            yield from (usable[i] for i in order)


def sample_rows(
    sequence: Sequence, length: int, count: int, first: int, generator: torch.Generator
) -> Tensor:
    """Query rows to train on: up to a quarter from the focus spans, the rest anywhere from `first` on.

    Returns:
        [<= count] int64, sorted, distinct
    """
    focused = [
        p
        for start, end in sequence.focus
        for p in range(max(start, first) - 1, min(end, length))
        if p >= first
    ]
    chosen = torch.tensor(focused, dtype=torch.int64)
    if len(chosen) > count // 4:
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[: count // 4]]
    anywhere = first + torch.randperm(length - first, generator=generator)[: count - len(chosen)]
    rows: Tensor = torch.unique(torch.cat((chosen, anywhere)))
    return rows
