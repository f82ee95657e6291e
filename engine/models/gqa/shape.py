"""The weights and cache of a model of this family, for inspection."""

from __future__ import annotations

from collections import Counter

from engine.memory.layouts import Int8KeyLayout
from engine.models.family import AttentionShape, Shape
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.weights import weight_table
from engine.protocol import IndexerInfo


def shape(config: GqaConfig, indexer: IndexerInfo | None) -> Shape:
    """Return the shape of a model; `indexer` is the overlay's, if there is one."""
    # Packed weights are the native kernels', whose index keys are integers unless a setting says otherwise.
    c, table = config, weight_table(config, indexer, short_queries=True)
    key = 0 if indexer is None else indexer.head_dim
    return Shape(
        architecture=c.architecture,
        num_layers=c.num_layers,
        max_positions=c.max_positions,
        index_top_k=None if indexer is None else indexer.default_index_top_k,
        table=table,
        rank_table=lambda count: table,
        mtp={},
        expert_share=1.0,
        index_layers=0 if indexer is None else c.num_layers,
        cache={
            name: (2 * c.num_kv_heads * c.head_dim * size, key * size)
            for name, size in (("bfloat16", 2), ("float32", 4))
        },
        native_cache=(
            2 * c.num_kv_heads * c.head_dim * 2,
            Int8KeyLayout(key).token_bytes if Int8KeyLayout.fits(key) else 2 * key,
        ),
        attention=tuple(
            AttentionShape(
                layers=layers,
                index_layers=0 if indexer is None else layers,
                heads=c.num_heads,
                key_dim=c.head_dim,
                value_dim=c.head_dim,
                index_heads=0 if indexer is None else indexer.num_heads,
                index_dim=key,
                window=window,
            )
            for window, layers in Counter(c.windows).items()
        ),
    )
