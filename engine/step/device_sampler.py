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

from engine.kernels.triton.sampling import DrawRows, Needs
from engine.plan.types import SampleSpec
from engine.step.race import stream_key

_ROW = struct.Struct("<Q3q6d")  # a row's columns, see engine.kernels.triton.race
_PADDING = _ROW.pack(0, 0, -1, 0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0)


def needs_of(specs: Sequence[SampleSpec]) -> Needs:
    """The least that does for these."""
    params = [spec.params for spec in specs]
    return Needs(
        draws=any(p.temperature > 0 for p in params),
        filters=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1 or p.min_p > 0) for p in params),
        changes=any(bool(p.logit_bias) or has_penalty(spec) for p, spec in zip(params, specs, strict=True)),
        logprobs=any(p.logprobs is not None for p in params),
        alternatives=max((p.logprobs or 0 for p in params), default=0),
    )


def has_penalty(spec: SampleSpec) -> bool:
    """Whether a history is looked at."""
    p = spec.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)


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
            slot if has_penalty(spec) else -1,
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
