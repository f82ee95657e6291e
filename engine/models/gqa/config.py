"""The shape of a llama-family model, from a config that `engine.checkpoint.hf_config` normalised. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError

_OFF = ("attention_bias", "mlp_bias")


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face `config.json` that shape the model."""

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

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> LlamaConfig:
        """From a config as `engine.checkpoint` normalises it.

        Raises:
            CheckpointError: a field is missing, or asks for something that this model does not do.
        """
        for name in _OFF:
            if config.get(name):
                raise CheckpointError(
                    f"config.json sets {name}, which the llama architecture here does not have"
                )
        if config.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not supported; llama uses silu")
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            kv_heads = int(config.get("num_key_value_heads") or heads)
            shape = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=int(config.get("head_dim") or hidden // heads),
                rms_norm_eps=float(config["rms_norm_eps"]),
                max_positions=int(config["max_position_embeddings"]),
                rope_theta=float(config.get("rope_theta") or 10000.0),
                rope_scaling=config.get("rope_scaling"),
                tied=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as missing:
            raise CheckpointError(
                f"config.json lacks {missing.args[0]!r}, which a llama model needs"
            ) from None
        if heads % kv_heads:
            raise CheckpointError(f"{heads} query heads cannot share {kv_heads} key heads evenly")
        return shape

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_heads // self.num_kv_heads
