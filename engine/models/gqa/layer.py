"""One layer's weights, as the model and its native form read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.layers.linear import Held
from engine.layers.low_rank import LowRank
from engine.protocol import IndexerInfo


def plain(weight: Held) -> Tensor:
    """One that is never packed."""
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class GqaLayer:
    """One layer's weights; E hidden, F intermediate."""

    input_norm: Tensor  # [E]
    qkv: Held  # [(Hq + 2 Hkv) * D, E]
    o: Held  # [E, Hq * D]
    post_norm: Tensor  # [E]
    gate_up: Held  # [2 F, E]
    down: Held  # [E, F]
    indexer: LightningIndexer | None
    adapter: tuple[LowRank, LowRank] | None  # to qkv and o, on rows with a selection

    @classmethod
    def of(cls, weights: Mapping[str, Held], i: int, info: IndexerInfo | None) -> GqaLayer:
        """Layer `i` of `weights`, named as in `engine.models.gqa.weights`; `info` is of its indexer."""

        def named(name: str) -> Held:
            return weights[f"layers.{i}.{name}"]

        indexer = adapter = None
        if info is not None:
            parts = IndexerWeights(
                wq=named("indexer.wq"),
                wk=named("indexer.wk"),
                k_norm_weight=plain(named("indexer.k_norm_weight")),
                k_norm_bias=plain(named("indexer.k_norm_bias")),
                weights_proj=named("indexer.weights_proj"),
            )
            indexer = LightningIndexer(parts, info.num_heads)
            if info.adapter_rank:
                adapter = (
                    LowRank(plain(named("adapter.qkv.a")), plain(named("adapter.qkv.b"))),
                    LowRank(plain(named("adapter.o.a")), plain(named("adapter.o.b"))),
                )
        return cls(
            input_norm=plain(named("input_norm")),
            qkv=named("qkv"),
            o=named("o"),
            post_norm=plain(named("post_norm")),
            gate_up=named("gate_up"),
            down=named("down"),
            indexer=indexer,
            adapter=adapter,
        )
