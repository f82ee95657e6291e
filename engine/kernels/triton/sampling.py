"""Sampling on the device: the token that `engine.step.sampler.sample` draws, for any mix of rows, without waiting for the host.

The random numbers are the same bits, since they are a hash that the kernels compute; the host makes a row's key
(`engine.step.device_sampler`), whose seed and place it knows. So a request has the same text on either.

What penalties look back on lies on the device too, a row of [slots, V] for each request that has any: twice how often
a token was generated, plus 1 if the prompt has it. A token that was drawn is counted there without the host
(`count_tokens`), so that the next step can be launched before this one's tokens are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from engine.kernels.triton import logprob, race
from engine.kernels.triton.kernel import block, kernel

_CHUNK = 2048
_CAPACITY = 8192
"""Candidates that are kept of a row; one with more is drawn from by passes over all its logits."""

_PROGRAMS = 16
"""A row's, for the second race, or both of a crowd."""

_BLOCK = 2048
"""Candidates of a row that its program holds in registers."""


@dataclass(frozen=True)
class Needs:
    """What any row of a step asks for, which decides what is launched. More than that never changes a token."""

    draws: bool = True  # a temperature above 0
    filters: bool = True  # top_k, top_p, min_p
    changes: bool = True  # penalties or bias
    logprobs: bool = True
    alternatives: int = 0  # likeliest tokens to report with each
    masks: bool = False  # tokens that may not be drawn


@dataclass(frozen=True)
class DrawRows:
    """How T rows are drawn from. Tensors that a graph may hold: a step fills them anew."""

    table: Tensor  # [T, 10] int64, columns as in `engine.kernels.triton.race`; those of reals hold float64's bits
    bias_ids: Tensor  # [T, B] int32
    bias_values: Tensor  # [T, B] float32
    history: Tensor  # [slots, V] int32, see `remember`
    masks: Tensor  # [M, W] int32: bit t % 32 of word t // 32 says whether token t may be drawn
    mask_of: Tensor  # [T] int32, a row's mask; -1: any token may be drawn


@dataclass(frozen=True)
class Draws:
    """What was drawn from T rows, on the device."""

    tokens: Tensor  # [T] int64; 0 where a row is not finite
    finite: Tensor  # [T] bool: whether all of a row's logits are, so that its token counts
    logprobs: Tensor | None  # [T] float32, natural, under the distribution before penalties and temperature
    ranks: Tensor | None  # [T] int32, from 1
    top_ids: Tensor | None  # [T, n] int32, likeliest first, of equals the lower id
    top_logprobs: Tensor | None  # [T, n] float32


def remember(history: Tensor, slot: int, prompt: Sequence[int], output: Sequence[int]) -> None:
    """Begin a slot of `history` [slots, V] int32 anew: twice the times in the output, plus 1 for being in the prompt."""
    own = history[slot]
    own.zero_()
    if output:
        ids = torch.tensor(output, device=own.device)
        own.index_put_((ids,), torch.full((), 2, dtype=own.dtype, device=own.device), accumulate=True)
    if prompt:
        ids = torch.tensor(sorted(set(prompt)), device=own.device)
        own[ids] += 1


def count_tokens(rows: DrawRows, tokens: Tensor) -> None:
    """Count what was drawn, tokens [T] int64, in the histories of the rows that have one; no two rows have the same."""
    if len(tokens):
        _count_tokens[(len(tokens),)](
            rows.history, rows.table, tokens, VOCAB=rows.history.shape[1], num_warps=1
        )


@kernel
def _count_tokens(history: tl.tensor, whole: tl.tensor, tokens: tl.tensor, VOCAB: tl.constexpr) -> None:
    """A program a row."""
    row = tl.program_id(0)
    slot = tl.load(whole + row * race.COLUMNS + race.SLOT)
    if slot >= 0:
        place = history + slot * VOCAB + tl.load(tokens + row)
        tl.store(place, tl.load(place) + 2)


def draw(logits: Tensor, rows: DrawRows, needs: Needs) -> Draws:
    """One token a row; see `engine.step.sampler.sample`.

    Args:
        logits: [T, V] float32 (or bfloat16, taken as they are); a row's numbers contiguous
        rows: T of them
        needs: what is launched; a row's wish that is not in it is not heeded
    """
    count, vocab = logits.shape
    device = logits.device
    chunks = -(-vocab // _CHUNK)

    def scratch(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape or (count, chunks), dtype=dtype, device=device)

    tokens, finite = scratch(torch.int64, count), scratch(torch.bool, count)
    logprobs, ranks = scratch(torch.float32, count), scratch(torch.int32, count)
    shown = min(needs.alternatives, vocab)
    top_ids, top_logprobs = scratch(torch.int32, count, shown), scratch(torch.float32, count, shown)
    reported = (logprobs, ranks, top_ids, top_logprobs) if needs.logprobs else (None, None, None, None)
    if not count:
        return Draws(tokens, finite, *reported)

    grid = (count, chunks)
    width = block(chunks)
    whole, real = rows.table, rows.table.view(torch.float64)
    bad, best_ids = scratch(torch.int32), scratch(torch.int32)
    chunk_peaks, sums, bests, masses = (scratch(torch.float32) for _ in range(4))
    filters = needs.draws and needs.filters
    num_groups = chunks * (_CHUNK // race.GROUP.value)
    groups = scratch(torch.float32, count, num_groups if filters else 1)
    source = scratch(torch.float32, count, vocab) if needs.changes or needs.masks else logits
    race.survey[grid](
        logits, source, whole, real, rows.bias_ids, rows.bias_values, rows.history, bad, chunk_peaks, sums, bests,
        best_ids, masses, groups, rows.masks, rows.mask_of, logits.stride(0), rows.bias_ids.stride(0),
        rows.masks.stride(0), VOCAB=vocab, CHUNK=_CHUNK, CHANGED=needs.changes, MASKED=needs.masks, DRAWN=needs.draws, FILTERS=filters,
        LOGPROBS=needs.logprobs, num_warps=8,
    )  # fmt: skip
    programs = min(chunks, _PROGRAMS)
    floors, winners = scratch(torch.int32, count), scratch(torch.int32, count)
    rests = scratch(torch.int64)
    first_ratios, ratios = (scratch(torch.float64, count, programs) for _ in range(2))
    first_runners, runners = (scratch(torch.int32, count, programs) for _ in range(2))
    if needs.draws:
        peaks, counters, rests = (
            scratch(torch.float32, count),
            scratch(torch.int32, count),
            scratch(torch.int64),
        )
        weights, ids = scratch(torch.float32, count, _CAPACITY), scratch(torch.int32, count, _CAPACITY)
        race.prepare[(count,)](
            whole, real, bests, groups, peaks, floors, counters, chunks, num_groups,
            VOCAB=vocab, CHUNKS_BLOCK=width, GROUPS_BLOCK=block(num_groups), FILTERS=filters,
            num_warps=8 if filters else 1,
        )  # fmt: skip
        race.collect[grid](
            source, real, bests, masses, peaks, floors, rests, counters, weights, ids, source.stride(0),
            VOCAB=vocab, CHUNK=_CHUNK, CAPACITY=_CAPACITY, num_warps=8,
        )  # fmt: skip
        race.choose[(count,)](
            source, whole, real, peaks, floors, rests, counters, weights, ids, winners, source.stride(0), chunks,
            VOCAB=vocab, CHUNKS_BLOCK=width, CAPACITY=_CAPACITY, BLOCK=_BLOCK, FILTERS=filters,
            num_warps=8,
        )  # fmt: skip
        race.race_on[(count, programs)](
            source, whole, real, peaks, floors, winners, first_ratios, first_runners, ratios, runners,
            source.stride(0), chunks,
            VOCAB=vocab, CHUNK=_CHUNK, num_warps=8,
        )  # fmt: skip
    shifts = scratch(torch.float32, count, 2)
    race.settle[(count,)](
        logits, bad, chunk_peaks, sums, bests, best_ids, whole, floors, rests, winners, first_ratios, first_runners,
        ratios, runners, tokens, finite,
        shifts, logprobs, logits.stride(0), chunks, programs,
        VOCAB=vocab, CHUNKS_BLOCK=width, DRAWN=needs.draws, LOGPROBS=needs.logprobs, num_warps=1,
    )  # fmt: skip
    if needs.logprobs:
        aheads = scratch(torch.int32)
        values, ids = scratch(torch.float32, count, chunks, shown), scratch(torch.int32, count, chunks, shown)
        logprob.rank_in_chunk[grid](
            logits, chunk_peaks, shifts, logprobs, aheads, values, ids, logits.stride(0),
            VOCAB=vocab, CHUNK=_CHUNK, CHUNKS_BLOCK=width, COUNT=shown, num_warps=8,
        )  # fmt: skip
        logprob.rank_in_row[(count,)](
            shifts, aheads, values, ids, ranks, top_ids, top_logprobs, chunks,
            VOCAB=vocab, CHUNKS_BLOCK=width, COUNT=shown, LIST_BLOCK=block(max(chunks * shown, 1)), num_warps=4,
        )  # fmt: skip
    return Draws(tokens, finite, *reported)
