"""Packs documents into token sequences: cuts long documents, and joins short neighbours with the separator."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lab.corpus.chatml import ChatML
from lab.corpus.documents import Document
from lab.corpus.lengths import OF_8K, Lengths

SHORTEST = 1024  # the rest of a source is dropped if it is shorter
_BLOCK = 60_000  # characters of neighbouring documents that stay together: about two sequences


@dataclass(frozen=True, slots=True)
class Packed:
    """A training sequence. `focus` has the spans [start, end) whose rows matter most."""

    ids: NDArray[np.uint32]
    kind: str
    sources: tuple[str, ...]
    focus: tuple[tuple[int, int], ...] = ()


def draw_length(rng: random.Random, lengths: Lengths = OF_8K) -> int:
    """Draw the length of a sequence of running text."""
    return rng.choices([length for length, _ in lengths.packed], [share for _, share in lengths.packed])[0]


def budgets(available: dict[str, int], total: int) -> dict[str, int]:
    """Share `total` evenly among names. No name gets more than is available; the others share the rest."""
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
    *,
    lengths: Lengths = OF_8K,
) -> Iterator[Packed]:
    """Make sequences from the documents of one source, until there are `budget` tokens or no more documents.

    Args:
        documents: the documents of one source, in order
        chat: encodes text
        rng: draws lengths and the order of blocks
        budget: tokens; the last sequence may go beyond it
        progress: callback that gets the tokens of each sequence
        lengths: of the sequences
    """
    blocks = _blocks(documents)
    rng.shuffle(blocks)
    buffer: list[int] = []
    made, length = 0, draw_length(rng, lengths)
    for block in blocks:
        for document in block:
            buffer += [*chat.text(document.text), chat.separator]
            while len(buffer) >= length and made < budget:
                yield Packed(np.array(buffer[:length], np.uint32), document.kind, (document.source,))
                made += length
                progress(length)
                buffer = buffer[length:]
                length = draw_length(rng, lengths)
            if made >= budget:
                return
    if len(buffer) >= SHORTEST:
        progress(len(buffer))
        last = documents[0]
        yield Packed(np.array(buffer, np.uint32), last.kind, (last.source,))


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
