"""Documents to token sequences: long ones cut, short neighbours joined with the separator between them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab.corpus.chatml import ChatML
from lab.corpus.documents import Document

LENGTHS = ((8192, 0.6), (6144, 0.2), (4096, 0.2))
"""Sequence lengths and how often each is drawn: mostly the whole context, some shorter."""
SHORTEST = 1024  # a rest shorter than this is not worth a step
_BLOCK = 60_000  # characters of neighbouring documents that stay together: about two sequences


@dataclass(frozen=True, slots=True)
class Packed:
    """Token ids that are trained on together. `focus` are spans [start, end) whose rows matter most."""

    ids: NDArray[np.uint16]
    kind: str
    sources: tuple[str, ...]
    focus: tuple[tuple[int, int], ...] = ()


def draw_length(rng: random.Random) -> int:
    """A sequence length from `LENGTHS`."""
    return rng.choices([length for length, _ in LENGTHS], [share for _, share in LENGTHS])[0]


def budgets(available: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly among names, where none gets more than it has and the rest share what is left."""
    shares: dict[str, int] = {}
    left = total
    for position, name in enumerate(sorted(available, key=lambda name: (available[name], name))):
        shares[name] = min(available[name], left // (len(available) - position))
        left -= shares[name]
    return shares


def pack(
    documents: Sequence[Document],
    chat: ChatML,
    rng: random.Random,
    budget: int,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Iterator[Packed]:
    """Sequences of one source's documents, `budget` tokens at most (give or take the last sequence)."""
    blocks = _blocks(documents)
    rng.shuffle(blocks)
    buffer: list[int] = []
    made, length = 0, draw_length(rng)
    for block in blocks:
        for document in block:
            buffer += [*chat.text(document.text), chat.separator]
            while len(buffer) >= length and made < budget:
                yield Packed(np.array(buffer[:length], np.uint16), document.kind, (document.source,))
                made += length
                progress(length)
                buffer = buffer[length:]
                length = draw_length(rng)
            if made >= budget:
                return
    if len(buffer) >= SHORTEST:
        progress(len(buffer))
        last = documents[0]
        yield Packed(np.array(buffer, np.uint16), last.kind, (last.source,))


def _blocks(documents: Sequence[Document]) -> list[list[Document]]:
    blocks: list[list[Document]] = [[]]
    size = 0
    for document in documents:
        if size >= _BLOCK:
            blocks.append([])
            size = 0
        blocks[-1].append(document)
        size += len(document.text)
    return [block for block in blocks if block]
