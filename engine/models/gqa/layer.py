"""One layer's weights, for the model and its native form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from engine.attention.indexer import IndexerWeights, LightningIndexer
from engine.layers.linear import Held
from engine.layers.low_rank import LowRank
from engine.protocol import IndexerInfo


def plain(weight: Held) -> Tensor:
    """Return a weight that is never packed."""
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class GqaLayer:
    """One layer's weights. E is the hidden size, F the intermediate size; Hq query and Hkv KV heads have D dims."""

    input_norm: Tensor  # [E]
    qkv: Held  # [(Hq + 2 Hkv) * D, E]
    o: Held  # [E, Hq * D]
    post_norm: Tensor  # [E]
    gate_up: Held  # [2 F, E]
    down: Held  # [E, F]
    indexer: LightningIndexer | None
    adapter: tuple[LowRank, LowRank] | None  # corrections of qkv and o on rows with a selection
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) * D]; None: no bias
    o_bias: Tensor | None  # [E]
    gate_up_bias: Tensor | None  # [2 F]
    down_bias: Tensor | None  # [E]
    q_norm: Tensor | None  # [D], for each query head before it is rotated; None: no norm
    k_norm: Tensor | None  # [D], for each key head before it is rotated; None: no norm
    window: int | None  # positions that a row sees; None: all up to its own

    @classmethod
    def of(
        cls, weights: Mapping[str, Held], i: int, info: IndexerInfo | None, window: int | None
    ) -> GqaLayer:
        """Take layer `i` out of `weights`, which are named as in `engine.models.gqa.weights`.

        Args:
            weights: the model's
            i: the layer
            info: the indexer's numbers; None without an indexer
            window: the layer's window; None: it has none
        """

        def named(name: str) -> Held:
            return weights[f"layers.{i}.{name}"]

        def optional(name: str) -> Tensor | None:
            return plain(named(name)) if f"layers.{i}.{name}" in weights else None

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
            qkv_bias=optional("qkv_bias"),
            o_bias=optional("o_bias"),
            gate_up_bias=optional("gate_up_bias"),
            down_bias=optional("down_bias"),
            q_norm=optional("q_norm"),
            k_norm=optional("k_norm"),
            window=window,
        )
