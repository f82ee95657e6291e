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
from engine.step.masking import TokenMasks
from engine.step.race import stream_key
from engine.step.sampler import NOT_FINITE, sample

_ROW = struct.Struct("<Q3q6d")  # a row's columns, see engine.kernels.triton.race
_PADDING = _ROW.pack(0, 0, -1, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def sample_on_device(
    logits: Tensor, specs: Sequence[SampleSpec], masks: TokenMasks | None = None
) -> list[Drawn]:
    """As `engine.step.sampler.sample`, and through it the rows with penalties, whose histories are on the host."""
    hosted = [row for row, spec in enumerate(specs) if has_penalty(spec.params)]
    if hosted:
        own = [row for row, spec in enumerate(specs) if not has_penalty(spec.params)]
        parts = [None if masks is None or not rows else masks.part(rows) for rows in (hosted, own)]
        drawn = dict(
            zip(hosted, sample(logits[hosted], [specs[row] for row in hosted], parts[0]), strict=True)
        )
        if own:
            drawn |= zip(
                own, sample_on_device(logits[own], [specs[row] for row in own], parts[1]), strict=True
            )
        return [drawn[row] for row in range(len(specs))]
    device = logits.device
    nobody = torch.zeros(1, 1, dtype=torch.int32, device=device)
    needs = needs_of(specs, masked=masks is not None)
    draws = draw(logits, rows_of(specs, [0] * len(specs), nobody, device, masks), needs)
    tokens: list[int] = draws.tokens.where(draws.finite, -1).tolist()
    logprobs: list[TokenLogprob | None] = [None] * len(specs)
    if needs.logprobs:
        logprobs = logprobs_of(draws, tokens, specs, given_logprobs(logits, specs))
    return [
        NOT_FINITE if token < 0 else Drawn(token_id=token, logprob=own)
        for token, own in zip(tokens, logprobs, strict=True)
    ]


def usual_needs(*, masks: bool) -> tuple[Needs, ...]:
    """What most steps ask for: greedy rows, draws, and draws with filters; `masks`: each of them also under masks."""
    plain = tuple(
        Needs(draws=draws, filters=filters, changes=False, logprobs=False)
        for draws, filters in ((False, False), (True, False), (True, True))
    )
    masked = tuple(
        Needs(draws=draws, filters=draws, changes=False, logprobs=False, masks=True)
        for draws in (False, True)
    )
    return plain + masked if masks else plain


def given_logprobs(logits: Tensor, specs: Sequence[SampleSpec]) -> list[Tensor | None]:
    """The log-probabilities [n] of the tokens that each spec names; None where it names none."""
    return [
        row.log_softmax(-1)[list(spec.params.logprob_token_ids)] if spec.params.logprob_token_ids else None
        for row, spec in zip(logits, specs, strict=True)
    ]


def logprobs_of(
    draws: Draws,
    tokens: Sequence[int],
    specs: Sequence[SampleSpec],
    given: Sequence[Tensor | None],
) -> list[TokenLogprob | None]:
    """What each spec asks to be told about its token; None where it asks nothing. `given`: what `given_logprobs` gave."""
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
    for spec, token, named, logprob, rank, ids, values in zip(specs, tokens, given, *columns, strict=True):
        shown = spec.params.logprobs
        if named is None:
            top = tuple(zip(ids[:shown], values[:shown], strict=True))
        else:
            top = tuple(zip(spec.params.logprob_token_ids, named.tolist(), strict=True))
        told.append(
            None if shown is None else TokenLogprob(token_id=token, logprob=logprob, rank=rank, top=top)
        )
    return told


def needs_of(specs: Sequence[SampleSpec], *, masked: bool = False) -> Needs:
    """The least that does for these; `masked`: some have a mask."""
    draws = filters = changes = False
    shown = -1
    for spec in specs:
        p = spec.params
        if p.temperature > 0:
            draws = True
            filters = filters or p.top_k > 0 or p.top_p < 1 or p.min_p > 0
        changes = changes or bool(spec.biases) or has_penalty(p)
        if p.logprobs is not None and p.logprobs > shown:
            shown = p.logprobs
    # With masks there are fewer kinds of draws, so that fewer graphs do.
    return Needs(draws, filters or (draws and masked), changes, shown >= 0, max(shown, 0), masked)


def rows_of(
    specs: Sequence[SampleSpec],
    slots: Sequence[int],
    history: Tensor,
    device: torch.device,
    masks: TokenMasks | None = None,
) -> DrawRows:
    """The requests' own words as rows.

    Args:
        specs: T of them
        slots: where each row's history lies; of no matter for a row without penalties
        history: [slots, V] int32
        device: where to
        masks: of the rows
    """
    words, of = no_masks(len(specs), device)
    if masks is not None:
        words, of = to_device(masks.words, device), to_device(masks.of, device)
    biases = [spec.biases for spec in specs]
    width = max(map(len, biases), default=0)
    ids = np.zeros((len(specs), max(width, 1)), dtype=np.int32)
    values = np.zeros(ids.shape, dtype=np.float32)
    for i, bias in enumerate(biases):
        if bias:
            ids[i, : len(bias)] = [token for token, _ in bias]
            values[i, : len(bias)] = [value for _, value in bias]
    return DrawRows(
        table=torch.from_numpy(table(specs, slots)).to(device),
        bias_ids=torch.from_numpy(ids).to(device),
        bias_values=torch.from_numpy(values).to(device),
        history=history,
        masks=words,
        mask_of=of,
    )


def no_masks(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`masks` and `mask_of` of `DrawRows`, for rows without masks."""
    nothing = torch.full((count,), -1, dtype=torch.int32, device=device)
    return nothing.unsqueeze(1), nothing


def to_device(numbers: NDArray[np.int32], device: torch.device) -> Tensor:
    """A copy on the device, for which the host does not wait."""
    host = torch.from_numpy(numbers)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def table(specs: Sequence[SampleSpec], slots: Sequence[int], count: int | None = None) -> NDArray[np.int64]:
    """`DrawRows.table`; rows after the specs, up to `count`, are padding: greedy, and nothing is counted."""
    packed = bytearray()
    for spec, slot in zip(specs, slots, strict=True):
        p = spec.params
        packed += _ROW.pack(
            stream_key(p.seed, spec.output_index) if p.temperature > 0 else 0,
            p.top_k,
            slot if has_penalty(spec.params) else -1,
            len(spec.biases),
            p.temperature,
            p.top_p,
            p.min_p,
            p.repetition_penalty,
            p.frequency_penalty,
            p.presence_penalty,
        )
    packed += _PADDING * ((count or len(specs)) - len(specs))
    return np.frombuffer(packed, dtype=np.int64).reshape(-1, 10)
