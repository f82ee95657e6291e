"""The weights and cache of a model of this family, for inspection."""

from __future__ import annotations

from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.models.family import AttentionShape, Shape
from engine.models.mla.config import MlaConfig
from engine.models.mla.weights import mtp_table, weight_table
from engine.parallel.ranks import Ranks


def shape(config: MlaConfig) -> Shape:
    """Return the shape of a model and its MTP modules."""
    c, key = config, config.indexer
    cache = {
        name: (c.latent_dim * size, 0 if key is None else key.head_dim * size)
        for name, size in (("bfloat16", 2), ("float32", 4))
    }
    cache["fp8"] = (
        LatentLayout(c.kv_lora_rank, c.qk_rope_head_dim).token_bytes,
        0 if key is None else IndexKeyLayout(key.head_dim).token_bytes,
    )
    modules = (mtp_table(c, k).items() for k in range(c.num_mtp_layers))
    return Shape(
        architecture=c.architecture,
        num_layers=c.num_layers,
        max_positions=c.max_positions,
        index_top_k=None if key is None else key.index_top_k,
        table=weight_table(c),
        rank_table=lambda count: weight_table(c, Ranks(0, count)),
        mtp={f"mtp.{k}.{name}": weight for k, module in enumerate(modules) for name, weight in module},
        expert_share=c.moe.experts_per_token / c.moe.num_experts,
        index_layers=sum(c.index_layers),
        cache=cache,
        attention=(
            AttentionShape(
                layers=c.num_layers,
                index_layers=sum(c.index_layers),
                heads=c.num_heads,
                key_dim=c.latent_dim,
                value_dim=c.kv_lora_rank,
                index_heads=0 if key is None else key.num_heads,
                index_dim=0 if key is None else key.head_dim,
                expanded=(c.qk_head_dim, c.v_head_dim),
            ),
        ),
    )
