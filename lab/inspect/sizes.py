"""Parameters and bytes of a model by arithmetic over its weight table; no weight is read.

The table is the one that loading walks, so what is counted is what would be loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint.loader import Weight, num_bytes, stays_fp8
from engine.errors import CheckpointError
from engine.memory.blocks import num_blocks
from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.models.gqa import weights as llama_weights
from engine.models.gqa.config import LlamaConfig
from engine.models.mla.config import DeepseekConfig
from engine.models.mla.weights import mtp_table, weight_table
from engine.parallel.ranks import Ranks
from engine.protocol import IndexerInfo

_EXPERT = re.compile(r".*\.mlp\.experts\.\d+\..*")
_INDEXER = re.compile(r".*\.self_attn\.indexer\..*")
_SHARED_WITH_MAIN = ("embed", "head")  # of an MTP module: copies of the main model's
_BLOCKED = re.compile(
    r".*\.(q_proj|k_proj|v_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    r"|indexer\.(wq_b|wk)|gate_proj|up_proj|down_proj)\.weight"
)
"""What DeepSeek stores in FP8. Routers, head weights, norms, embeddings and MTP projections are not."""


@dataclass(frozen=True)
class Shape:
    """A model as inspection sees it."""

    architecture: str
    num_layers: int
    max_positions: int
    top_k: int | None  # of its indexer; None: it has none
    table: Mapping[str, Weight]
    rank_table: Callable[[int], Mapping[str, Weight]]  # number of devices -> of the first, which holds most
    mtp: Mapping[str, Weight]  # of all its MTP modules; empty where it has none
    expert_share: float  # of a token's routed experts
    index_layers: int  # that cache an index key
    cache: Mapping[str, tuple[int, int]]  # cache dtype -> bytes a token a layer of (KV, index key)


def read_shape(config: Mapping[str, Any], indexer: IndexerInfo | None) -> Shape:
    """From a config as `engine.checkpoint` normalises it, and the overlay's indexer if there is one.

    Raises:
        CheckpointError: the config does not make a model.
    """
    if config["model_type"] == "llama":
        return _llama(config, indexer)
    if indexer is not None:
        raise CheckpointError(f"an indexer overlay does not fit {config['model_type']}, which brings its own")
    return _deepseek(config)


def _llama(config: Mapping[str, Any], indexer: IndexerInfo | None) -> Shape:
    c = LlamaConfig.read(config)
    table = llama_weights.weight_table(c, indexer)
    cache = {}
    for name, size in (("bfloat16", 2), ("float32", 4)):
        key = 0 if indexer is None else indexer.head_dim * size
        cache[name] = (2 * c.num_kv_heads * c.head_dim * size, key)
    return Shape(
        architecture="llama",
        num_layers=c.num_layers,
        max_positions=c.max_positions,
        top_k=None if indexer is None else indexer.default_index_top_k,
        table=table,
        rank_table=lambda count: table,
        mtp={},
        expert_share=1.0,
        index_layers=0 if indexer is None else c.num_layers,
        cache=cache,
    )


def _deepseek(config: Mapping[str, Any]) -> Shape:
    c = DeepseekConfig.read(config)
    dim = None if c.indexer is None else c.indexer.head_dim
    cache = {
        name: (c.latent_dim * size, 0 if dim is None else dim * size)
        for name, size in (("bfloat16", 2), ("float32", 4))
    }
    cache["fp8"] = (
        LatentLayout(c.kv_lora_rank, c.qk_rope_head_dim).token_bytes,
        0 if dim is None else IndexKeyLayout(dim).token_bytes,
    )
    modules = (mtp_table(c, k).items() for k in range(c.num_mtp_layers))
    return Shape(
        architecture=c.architecture,
        num_layers=c.num_layers,
        max_positions=c.max_positions,
        top_k=None if c.indexer is None else c.indexer.top_k,
        table=weight_table(c),
        rank_table=lambda count: weight_table(c, Ranks(0, count)),
        mtp={f"mtp.{k}.{name}": weight for k, module in enumerate(modules) for name, weight in module},
        expert_share=c.moe.experts_per_token / c.moe.num_experts,
        index_layers=sum(c.index_layers),
        cache=cache,
    )


@dataclass(frozen=True)
class Parameters:
    """How many numbers; `active` ones are used for one token, which reads one row of the embedding."""

    total: int  # of the main model
    active: int
    indexer: int  # of total, and of active
    mtp: int  # more than total: the MTP modules, less their copies of embedding and head


def count(shape: Shape) -> Parameters:
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
    return Parameters(total, active, indexer, mtp)


@dataclass(frozen=True)
class Loaded:
    """Bytes of the weights on the device."""

    total: int
    fp8: int  # of those, in weights that stay in FP8 blocks, with their scales
    dequantised: int  # of those, in weights that are stored in FP8 blocks and become plain


def loaded_bytes(
    table: Mapping[str, Weight], dtype: torch.dtype, in_blocks: Callable[[str], bool], *, keep: bool
) -> Loaded:
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
    return Loaded(total, fp8, dequantised)


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
