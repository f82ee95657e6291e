"""Parameters and bytes of a model by arithmetic over its weight table; no weight is read.

The table is the one that loading walks, so what is counted is what would be loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.checkpoint.loader import Weight, num_bytes, stays_fp8
from engine.memory.blocks import num_blocks
from engine.models.family import Shape

_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\..*")
_INDEXER = re.compile(r".*\.self_attn\.indexer\..*")
_SHARED_WITH_MAIN = ("embed", "head")  # of an MTP module: copies of the main model's
_BLOCKED = re.compile(
    r".*\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    r"|indexer\.(wq_b|wk)|gate_proj|up_proj|down_proj)\.weight"
)
"""What DeepSeek stores in FP8. Routers, head weights, norms, embeddings and MTP projections are not."""


@dataclass(frozen=True)
class ParameterCounts:
    """How many numbers; `active` ones are used for one token, which reads one row of the embedding."""

    total: int  # of the main model
    active: int
    indexer: int  # of total, and of active
    mtp: int  # more than total: the MTP modules, less their copies of embedding and head


def count(shape: Shape) -> ParameterCounts:
    """Count the table."""
    total = experts = indexer = 0
    for weight in shape.table.values():
        size = math.prod(weight.shape)
        total += size
        if _EXPERT.fullmatch(weight.names[0]):
            experts += size
        elif _INDEXER.fullmatch(weight.names[0]):
            indexer += size
    mtp = sum(
        math.prod(weight.shape)
        for name, weight in shape.mtp.items()
        if name.rpartition(".")[2] not in _SHARED_WITH_MAIN
    )
    active = total - experts + round(experts * shape.expert_share)
    if "head" in shape.table:  # else the embedding is the head too, and all of it is used
        vocab, hidden = shape.table["embed"].shape
        active -= (vocab - 1) * hidden
    return ParameterCounts(total, active, indexer, mtp)


@dataclass(frozen=True)
class LoadedSizes:
    """Bytes of the weights on the device."""

    total: int
    fp8: int  # of those, in weights that stay in FP8 blocks, with their scales
    dequantised: int  # of those, in weights that are stored in FP8 blocks and become plain


def loaded_bytes(
    table: Mapping[str, Weight], dtype: torch.dtype, in_blocks: Callable[[str], bool], *, keep: bool
) -> LoadedSizes:
    """All in `dtype` but what the table holds otherwise, and the head in float32.

    Args:
        in_blocks: of a tensor's name, whether it is stored in FP8 blocks
        keep: whether what is stored so stays so where the model can use it
    """
    fp8 = dequantised = 0
    total = 4 * math.prod(table["head" if "head" in table else "embed"].shape)
    for name, weight in table.items():
        if name == "head":
            continue
        kept = keep and stays_fp8(weight, in_blocks)
        size = num_bytes(weight, dtype, fp8=kept)
        total += size
        if kept:
            fp8 += size
        elif any(in_blocks(stored) for stored in weight.names):
            dequantised += size
    return LoadedSizes(total, fp8, dequantised)


def published_in_blocks(name: str) -> bool:
    """Whether DeepSeek stores a tensor of this name in FP8 blocks."""
    return _BLOCKED.fullmatch(name) is not None


def published_bytes(table: Mapping[str, Weight], *, fp8: bool, itemsize: int) -> int:
    """In files as DeepSeek writes them: `fp8` with scales where it quantises, else `itemsize` bytes a number."""
    size = 0
    for weight in table.values():
        rows = weight.shape[0] // len(weight.names)  # parts of one parameter are equally large there
        for name in weight.names:
            numbers = rows * math.prod(weight.shape[1:])
            if fp8 and published_in_blocks(name):
                size += numbers + 4 * num_blocks(rows) * num_blocks(weight.shape[1])
            else:
                size += numbers * (4 if name.endswith("e_score_correction_bias") else itemsize)
    return size
