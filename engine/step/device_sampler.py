"""What a step's requests ask of the sampling kernels (`engine.kernels.triton.sampling`), as tensors.

The kernels draw the tokens that `engine.step.sampler` draws: the random numbers are the same bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels.triton.sampling import DrawRows, Draws, Needs, draw
from engine.plan.types import Drawn, SampleSpec
from engine.protocol import TokenLogprob, has_penalty
from engine.step.race import stream_key
from engine.step.sampler import NOT_FINITE, sample

_ROW = struct.Struct("<Q3q6d")  # a row's columns, see engine.kernels.triton.race
_PADDING = _ROW.pack(0, 0, -1, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def sample_on_device(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Drawn]:
    """As `engine.step.sampler.sample`, and through it the rows with penalties, whose histories are on the host."""
    hosted = [row for row, spec in enumerate(specs) if has_penalty(spec.params)]
    if hosted:
        own = [row for row, spec in enumerate(specs) if not has_penalty(spec.params)]
        drawn = dict(zip(hosted, sample(logits[hosted], [specs[row] for row in hosted]), strict=True))
        if own:
            drawn |= zip(own, sample_on_device(logits[own], [specs[row] for row in own]), strict=True)
        return [drawn[row] for row in range(len(specs))]
    device = logits.device
    nobody = torch.zeros(1, 1, dtype=torch.int32, device=device)
    needs = needs_of(specs)
    draws = draw(logits, rows_of(specs, [0] * len(specs), nobody, device), needs)
    tokens: list[int] = draws.tokens.where(draws.finite, -1).tolist()
    logprobs = logprobs_of(draws, tokens, specs) if needs.logprobs else [None] * len(specs)
    return [
        NOT_FINITE if token < 0 else Drawn(token_id=token, logprob=own)
        for token, own in zip(tokens, logprobs, strict=True)
    ]


def logprobs_of(
    draws: Draws, tokens: Sequence[int], specs: Sequence[SampleSpec]
) -> list[TokenLogprob | None]:
    """What each spec asks to be told about its token; None where it asks nothing."""
    assert draws.logprobs is not None
    assert draws.ranks is not None
    assert draws.top_ids is not None
    assert draws.top_logprobs is not None
    told: list[TokenLogprob | None] = []
    columns = (
        draws.logprobs.tolist(),
        draws.ranks.tolist(),
        draws.top_ids.tolist(),
        draws.top_logprobs.tolist(),
    )
    for spec, token, logprob, rank, ids, values in zip(specs, tokens, *columns, strict=True):
        shown = spec.params.logprobs
        top = tuple(zip(ids[:shown], values[:shown], strict=True))
        told.append(
            None if shown is None else TokenLogprob(token_id=token, logprob=logprob, rank=rank, top=top)
        )
    return told


def needs_of(specs: Sequence[SampleSpec]) -> Needs:
    """The least that does for these."""
    draws = filters = changes = False
    shown = -1
    for spec in specs:
        p = spec.params
        if p.temperature > 0:
            draws = True
            filters = filters or p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        changes = changes or bool(p.logit_bias) or has_penalty(p)
        if p.logprobs is not None and p.logprobs > shown:
            shown = p.logprobs
    return Needs(draws, filters, changes, shown >= 0, max(shown, 0))


def rows_of(
    specs: Sequence[SampleSpec], slots: Sequence[int], history: Tensor, device: torch.device
) -> DrawRows:
    """The requests' own words as rows.

    Args:
        specs: T of them
        slots: where each row's history lies; of no matter for a row without penalties
        history: [slots, V] int32
        device: where to
    """
    width = max((len(spec.params.logit_bias) for spec in specs), default=0)
    ids = np.zeros((len(specs), max(width, 1)), dtype=np.int32)
    values = np.zeros(ids.shape, dtype=np.float32)
    for i, spec in enumerate(specs):
        if bias := spec.params.logit_bias:
            ids[i, : len(bias)] = [token for token, _ in bias]
            values[i, : len(bias)] = [value for _, value in bias]
    return DrawRows(
        table=torch.from_numpy(table(specs, slots)).to(device),
        bias_ids=torch.from_numpy(ids).to(device),
        bias_values=torch.from_numpy(values).to(device),
        history=history,
    )


def table(specs: Sequence[SampleSpec], slots: Sequence[int], count: int | None = None) -> NDArray[np.int64]:
    """`DrawRows.table`; rows after the specs, up to `count`, are padding: greedy, and nothing is counted."""
    packed = bytearray()
    for spec, slot in zip(specs, slots, strict=True):
        p = spec.params
        packed += _ROW.pack(
            stream_key(p.seed, spec.output_index) if p.temperature > 0 else 0,
            p.top_k,
            slot if has_penalty(spec.params) else -1,
            len(p.logit_bias),
            p.temperature,
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        )
    packed += _PADDING * ((count or len(specs)) - len(specs))
    return np.frombuffer(packed, dtype=np.int64).reshape(-1, 10)
