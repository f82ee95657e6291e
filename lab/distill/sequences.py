"""Reads the training text (token ids and spans) that `dsa corpus` has built, and samples from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import ConfigError
from lab.corpus.manifest import SequenceInfo, StoredIds, load_manifest, load_tokens


class CorpusSplit:
    """A token file, the places of its sequences in it, and its digest."""

    def __init__(self, tokens: StoredIds, sequences: tuple[SequenceInfo, ...], digest: str = "") -> None:
        self._tokens = tokens
        self.sequences = sequences
        self.digest = digest

    @classmethod
    def open(cls, folder: Path, name: str, vocab_size: int) -> CorpusSplit:
        """Map one split of a corpus folder into memory.

        Raises:
            ConfigError: the folder is not a corpus, or was built with another vocabulary.
        """
        rebuild = f"build one: dsa corpus --out {folder} --model MODEL"
        try:
            entry = load_manifest(folder).splits[name]
            tokens = load_tokens(folder, entry)
        except (OSError, KeyError, ValueError, EOFError) as error:
            raise ConfigError(
                f"{folder} holds no corpus with a {name!r} split ({error}); {rebuild}"
            ) from None
        if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
            raise ConfigError(f"{folder / entry.file} is not a file of tokens; {rebuild}")
        if any(s.start + s.length > len(tokens) for s in entry.sequences):
            raise ConfigError(f"{folder / entry.file} is shorter than its manifest says; {rebuild}")
        if len(tokens) and int(tokens.max()) >= vocab_size:
            raise ConfigError(
                f"{folder} has token {int(tokens.max())}, but the model knows {vocab_size} tokens: it was built "
                f"with another model's tokenizer; {rebuild}"
            )
        return cls(tokens, entry.sequences, entry.sha256)

    def tokens(self, sequence: SequenceInfo, max_length: int, device: torch.device) -> Tensor:
        """Return a sequence's tokens: [min(length, max_length)] int64."""
        end = sequence.start + min(sequence.length, max_length)
        return torch.from_numpy(self._tokens[sequence.start : end].astype(np.int64)).to(device)

    def shuffled(
        self,
        seed: int,
        min_length: int,
        shares: Mapping[str, float] | None = None,
        most: int | None = None,
    ) -> Iterator[SequenceInfo]:
        """Pass over the sequences again and again without end, each time in a new order.

        Args:
            seed: decides the orders
            min_length: sequences with fewer tokens are left out
            most: sequences with more tokens are left out; None leaves out none
            shares: kind of text -> its share of the sequences; other kinds are left out. None or empty takes
                all sequences as they are.

        Raises:
            ConfigError: from the first `next`, if no sequence has such a length, or none of a kind in `shares`.
        """
        usable = [s for s in self.sequences if s.length >= min_length and (most is None or s.length <= most)]
        wanted = f"{min_length} tokens" if most is None else f"{min_length} to {most} tokens"
        if not usable:
            raise ConfigError(
                f"no sequence of the corpus has {wanted}; lower the recipe's min_length, or build more"
            )
        if not shares:
            yield from _passes(usable, (seed,))
            return
        kinds = sorted(shares)
        present = sorted({s.kind for s in usable})
        for kind in kinds:
            if kind not in present:
                raise ConfigError(
                    f"the recipe asks for a share of {kind!r}, of which the corpus has no sequence of {wanted}; "
                    f"it has {', '.join(present)}"
                )
        passes = [_passes([s for s in usable if s.kind == kind], (seed, i)) for i, kind in enumerate(kinds)]
        weights = np.array([shares[kind] for kind in kinds])
        rng = np.random.default_rng(seed)
        while True:
            yield next(passes[int(rng.choice(len(kinds), p=weights / weights.sum()))])


def _passes(sequences: list[SequenceInfo], seed: tuple[int, ...]) -> Iterator[SequenceInfo]:
    for epoch in range(1 << 30):
        order = np.random.default_rng((*seed, epoch)).permutation(len(sequences))
        yield from (sequences[i] for i in order)


def sample_rows(
    sequence: SequenceInfo, length: int, count: int, first: int, generator: torch.Generator, *,
    share: float = 0.25, before: int = 0,
) -> Tensor:  # fmt: skip
    """Draw query rows to train on: up to `share` of them from the focus spans, the rest from anywhere.

    Args:
        sequence: the sequence
        length: the number of its tokens after cutting
        count: the number of rows
        first: the first row that may be drawn
        generator: the source of random numbers
        share: the largest share of the rows from focus spans
        before: how many tokens before a focus span belong to it

    Returns:
        [<= count] int64, sorted, distinct
    """
    # Row p predicts token p + 1, so the row before a span predicts the span's first token.
    focused = sorted(
        {p for start, end in sequence.focus for p in range(max(start - 1 - before, first), min(end, length))}
    )
    chosen = torch.tensor(focused, dtype=torch.int64)
    most = int(share * count)
    if len(chosen) > most:
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:most]]
    anywhere = first + torch.randperm(length - first, generator=generator)[: count - len(chosen)]
    rows: Tensor = torch.unique(torch.cat((chosen, anywhere)))
    return rows


def answer_rows(sequence: SequenceInfo, length: int) -> Tensor:
    """Return the rows of a sequence cut to `length` whose next token is in a focus span: [m] int64, sorted."""
    rows = {p for start, end in sequence.focus for p in range(max(start - 1, 0), min(end, length) - 1)}
    return torch.tensor(sorted(rows), dtype=torch.int64)
