"""The config of a decoder with grouped-query attention, read and checked. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import CheckpointError
from engine.models import fields


@dataclass(frozen=True)
class Member:
    """How the members of the family differ: the defaults of their configs, and what no field of a config says.

    Attributes:
        max_positions: the default of `max_position_embeddings`
        head_dim: the default of `head_dim`; None: hidden size / query heads
        bias: whether projections have biases. `config`: `attention_bias` says it for q, k, v and o, and `mlp_bias` for
            the MLP. `qkv`: q, k and v always have biases, o and the MLP never
        qk_norm: whether each head of queries and keys is normalised before it is rotated
        windows: which layers see only `sliding_window` positions. `layers`: those that `layer_types` names, or else
            those from `max_window_layers` on, if `use_sliding_window` is true. `all`: every layer, unless
            `sliding_window` is null
    """

    max_positions: int
    head_dim: int | None = None
    bias: Literal["config", "qkv"] = "config"
    qk_norm: bool = False
    windows: Literal["none", "layers", "all"] = "none"


MEMBERS: Mapping[str, Member] = {
    "llama": Member(2048),
    "mistral": Member(131072, windows="all"),
    "qwen2": Member(32768, bias="qkv", windows="layers"),
    "qwen3": Member(32768, head_dim=128, qk_norm=True, windows="layers"),
}


@dataclass(frozen=True)
class GqaConfig:
    """The fields of a config.json that decide what the model computes."""

    architecture: str  # model_type
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[
        int | None, ...
    ]  # one for each layer: row p sees positions p - window + 1 to p; None: all up to p

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> GqaConfig:
        """Read the object of a config.json. Defaults of missing fields are those of transformers.

        Raises:
            CheckpointError: a field is missing, makes no sense, or asks for something that the family does not do.
        """
        member = MEMBERS[raw["model_type"]]
        if raw.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{where} has hidden_act {raw['hidden_act']!r}; only silu is supported")
        heads = fields.count(raw, "num_attention_heads", where)
        kv_heads = fields.count(raw, "num_key_value_heads", where, heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"{where} has {heads} query heads, which cannot share {kv_heads} key heads evenly"
            )
        hidden = fields.count(raw, "hidden_size", where)
        max_positions = fields.count(raw, "max_position_embeddings", where, member.max_positions)
        layers = fields.count(raw, "num_hidden_layers", where)
        by_config = member.bias == "config"
        attention_bias = by_config and fields.flag(raw, "attention_bias", where, False)
        theta, scaling = fields.rope(raw, where, max_positions)
        return cls(
            architecture=str(raw["model_type"]),
            vocab_size=fields.count(raw, "vocab_size", where),
            hidden_size=hidden,
            intermediate_size=fields.count(raw, "intermediate_size", where),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=fields.count(raw, "head_dim", where, member.head_dim or hidden // heads),
            rms_norm_eps=fields.positive(raw, "rms_norm_eps", where, 1e-6),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            tied=fields.flag(raw, "tie_word_embeddings", where, False),
            qkv_bias=attention_bias or not by_config,
            o_bias=attention_bias,
            mlp_bias=by_config and fields.flag(raw, "mlp_bias", where, False),
            qk_norm=member.qk_norm,
            windows=_windows(raw, where, layers, max_positions, member.windows),
        )

    @property
    def group(self) -> int:
        """How many query heads share a KV head."""
        return self.num_heads // self.num_kv_heads


def _windows(
    raw: Mapping[str, Any],
    where: str,
    layers: int,
    max_positions: int,
    kind: Literal["none", "layers", "all"],
) -> tuple[int | None, ...]:
    """Return each layer's window. A window that holds all of the model's positions counts as None."""
    size: int | None = None
    if kind == "all" or (kind == "layers" and fields.flag(raw, "use_sliding_window", where, False)):
        unset = "sliding_window" in raw and raw["sliding_window"] is None
        size = None if unset else fields.count(raw, "sliding_window", where, 4096)
    narrow = [True] * layers
    if kind == "layers" and raw.get("layer_types") is not None:
        types = fields.layer_list(raw, "layer_types", where, layers, ("full_attention", "sliding_attention"))
        narrow = [one == "sliding_attention" for one in types]
        if any(narrow) and size is None:
            raise CheckpointError(f"{where} has layers of sliding_attention, but no sliding_window in use")
    elif kind == "layers":
        first = fields.count(raw, "max_window_layers", where, 28, least=0)
        narrow = [i >= first for i in range(layers)]
    return tuple(size if one and size is not None and size < max_positions else None for one in narrow)
