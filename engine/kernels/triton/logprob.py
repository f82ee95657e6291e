"""A drawn token's rank among all tokens, and the likeliest ones: `engine.step.sampler.token_logprobs` in kernels."""

from __future__ import annotations

import triton.language as tl

from engine.kernels.triton.kernel import kernel


@kernel
def _take_best(values: tl.tensor, ids: tl.tensor, VOCAB: tl.constexpr) -> tl.tuple:
    """The largest value, the least of the ids that have it, and the values without it.

    Where no id is left, VOCAB is the id.
    """
    there = ids < VOCAB
    best = tl.max(tl.where(there, values, float("-inf")), 0)
    token = tl.min(tl.where(there & (values == best), ids, VOCAB), 0)
    return best, token, tl.where(ids == token, VOCAB, ids)


@kernel
def rank_in_chunk(
    logits: tl.tensor,
    chunk_peaks: tl.tensor,
    shifts: tl.tensor,
    logprobs: tl.tensor,
    aheads: tl.tensor,
    chunk_values: tl.tensor,
    chunk_ids: tl.tensor,
    row_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
) -> None:
    """A program a row and chunk: how many tokens are likelier than the drawn one, and the COUNT likeliest, [T, C, COUNT].

    A chunk whose best is behind that of COUNT others has nobody to name: VOCAB.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < VOCAB
    x = tl.load(logits + row * row_stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    own = tl.load(logprobs + row)
    each = (x - tl.load(shifts + row * 2)) - tl.load(shifts + row * 2 + 1)
    place = row * tl.num_programs(1) + chunk
    tl.store(aheads + place, tl.sum((inside & (each > own)).to(tl.int32), 0))
    if COUNT > 0:
        chunks = tl.num_programs(1)
        each_chunk = tl.arange(0, CHUNKS_BLOCK)
        peak = tl.load(chunk_peaks + row * chunks + each_chunk, mask=each_chunk < chunks, other=float("-inf"))
        before = tl.sum((peak > tl.load(chunk_peaks + place)).to(tl.int32), 0)
        ids = tl.where(inside & (before < COUNT), at, VOCAB)
        for i in range(COUNT):
            best = float("-inf")
            token = VOCAB
            if before < COUNT:
                best, token, ids = _take_best(x, ids, VOCAB)
            tl.store(chunk_values + place * COUNT + i, best)
            tl.store(chunk_ids + place * COUNT + i, token)


@kernel
def rank_in_row(
    shifts: tl.tensor,
    aheads: tl.tensor,
    chunk_values: tl.tensor,
    chunk_ids: tl.tensor,
    ranks: tl.tensor,
    top_ids: tl.tensor,
    top_logprobs: tl.tensor,
    chunks: tl.tensor,
    VOCAB: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
) -> None:
    """A program a row, from its chunks: the drawn token's rank, 1 if none is likelier, and the likeliest, [T, COUNT]."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, CHUNKS_BLOCK)
    ahead = tl.load(aheads + row * chunks + each, mask=each < chunks, other=0)
    tl.store(ranks + row, tl.sum(ahead, 0) + 1)
    if COUNT > 0:
        at = tl.arange(0, LIST_BLOCK)
        listed = at < chunks * COUNT
        values = tl.load(chunk_values + row * chunks * COUNT + at, mask=listed, other=float("-inf"))
        ids = tl.load(chunk_ids + row * chunks * COUNT + at, mask=listed, other=VOCAB)
        highest = tl.load(shifts + row * 2)
        shift = tl.load(shifts + row * 2 + 1)
        for i in range(COUNT):
            best, token, ids = _take_best(values, ids, VOCAB)
            tl.store(top_ids + row * COUNT + i, token)
            tl.store(top_logprobs + row * COUNT + i, (best - highest) - shift)
