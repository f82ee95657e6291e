"""Counts parameters and bytes of a model from its weight table; no weight is read.

Loading uses the same table, so exactly the weights that would be loaded are counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.checkpoint.loader import Weight, num_bytes, stays_fp8
from engine.checkpoint.quantisation import published_in_blocks
from engine.memory.blocks import num_blocks
from engine.models.family import Shape

_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\..*")
_INDEXER = re.compile(r".*\.self_attn\.indexer\..*")
_SHARED_WITH_MAIN = ("embed", "head")  # parts of an MTP module that are copies of the main model's


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters."""

    total: int  # of the main model
    active: int  # used for one token, which reads one row of the embedding
    indexer: int  # also counted in total and active
    mtp: int  # of the MTP modules without their copies of embedding and head; not counted in total


def count(shape: Shape) -> ParameterCounts:
    """Count the parameters of a model."""
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
    if "head" in shape.table:  # else the embedding is also the head, and all of it is used
        vocab, hidden = shape.table["embed"].shape
        active -= (vocab - 1) * hidden
    return ParameterCounts(total, active, indexer, mtp)


@dataclass(frozen=True)
class LoadedSizes:
    """Bytes of the weights on the device."""

    total: int
    fp8: int  # part of total: weights that stay in FP8 blocks, with their scales
    dequantised: int  # part of total: weights that are stored in FP8 blocks and become plain


def loaded_bytes(
    table: Mapping[str, Weight], dtype: torch.dtype, in_blocks: Callable[[str], bool], *, keep: bool
) -> LoadedSizes:
    """Count the bytes of loaded weights. They are in `dtype` unless the table says otherwise; the head is in float32.

    Args:
        table: the weights
        dtype: the dtype of plain weights
        in_blocks: whether the tensor with this name is stored in FP8 blocks
        keep: whether tensors in FP8 blocks stay in FP8 if the model can use them
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


def published_bytes(table: Mapping[str, Weight], *, fp8: bool, itemsize: int) -> int:
    """Count the bytes of files as DeepSeek writes them.

    With `fp8`, tensors that DeepSeek quantises take one byte a number and their scales; others take `itemsize` bytes.
    """
    size = 0
    for weight in table.values():
        rows = weight.shape[0] // len(weight.names)  # all tensors of one weight have the same size there
        for name in weight.names:
            numbers = rows * math.prod(weight.shape[1:])
            if fp8 and published_in_blocks(name):
                size += numbers + 4 * num_blocks(rows) * num_blocks(weight.shape[1])
            else:
                size += numbers * (4 if name.endswith("e_score_correction_bias") else itemsize)
    return size
