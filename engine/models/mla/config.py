"""The shape of a DeepSeek-V3-family model: deepseek_v3 (dense), deepseek_v32 and glm_moe_dsa (GLM-5).

Fields come from a config that `engine.checkpoint.hf_config` normalised. Imports no torch, so that sizes can be
worked out without a device. Names as in the papers: arXiv 2412.19437 (V3: MLA, MoE, MTP), arXiv 2512.02556
(V3.2: lightning indexer), arXiv 2602.15763 (GLM-5), arXiv 2603.12201 (cross-layer index sharing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.layers.moe import MoEConfig


@dataclass(frozen=True)
class IndexConfig:
    """The lightning indexer that the checkpoint brings."""

    num_heads: int
    head_dim: int
    rope_dim: int  # the first dims of a head are rotated
    rope_interleaved: bool  # False: half-split, as in V3.2; True in GLM-5
    top_k: int  # what it was trained to select


@dataclass(frozen=True)
class DeepseekConfig:
    """What shapes the model."""

    architecture: str  # model_type
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer's MLP
    num_layers: int
    num_heads: int
    q_lora_rank: int | None  # None: queries come straight from the hidden state
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rms_norm_eps: float
    max_positions: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    rope_interleaved: bool  # of MLA: True in every published model
    tied: bool
    moe: MoEConfig
    moe_layers: tuple[bool, ...]  # one a layer; False: dense MLP
    indexer: IndexConfig | None  # None: attention is dense
    index_layers: tuple[bool, ...]  # one a layer; False: uses the selection of the last True layer before it
    num_mtp_layers: int  # as declared; a checkpoint may leave their tensors out

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> DeepseekConfig:
        """From a config as `engine.checkpoint` normalises it.

        Raises:
            CheckpointError: it asks for something that this family does not do, or contradicts itself.
        """
        _refuse_unknown(config)
        family = str(config["model_type"])
        moe = MoEConfig(
            num_experts=config["n_routed_experts"],
            num_shared_experts=config["n_shared_experts"],
            experts_per_token=config["num_experts_per_tok"],
            num_groups=config["n_group"],
            groups_per_token=config["topk_group"],
            normalise=config["norm_topk_prob"],
            scaling=config["routed_scaling_factor"],
            intermediate_size=config["moe_intermediate_size"],
        )
        _check_moe(moe)
        indexer = None
        if "index_topk" in config and "indexer_types" in config:
            indexer = IndexConfig(
                num_heads=config["index_n_heads"],
                head_dim=config["index_head_dim"],
                rope_dim=config["qk_rope_head_dim"],
                rope_interleaved=config["indexer_rope_interleave"],
                top_k=config["index_topk"],
            )
        layers = int(config["num_hidden_layers"])
        shape = cls(
            architecture=family,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=config["num_attention_heads"],
            q_lora_rank=config["q_lora_rank"],
            kv_lora_rank=config["kv_lora_rank"],
            qk_nope_head_dim=config["qk_nope_head_dim"],
            qk_rope_head_dim=config["qk_rope_head_dim"],
            v_head_dim=config["v_head_dim"],
            rms_norm_eps=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            rope_scaling=config["rope_scaling"],
            rope_interleaved=config["rope_interleave"],
            tied=config["tie_word_embeddings"],
            moe=moe,
            moe_layers=tuple(kind == "sparse" for kind in config["mlp_layer_types"]),
            indexer=indexer,
            index_layers=(
                (False,) * layers
                if indexer is None
                else tuple(kind == "full" for kind in config["indexer_types"])
            ),
            num_mtp_layers=config["num_nextn_predict_layers"],
        )
        if shape.qk_rope_head_dim % 2:
            raise CheckpointError(f"qk_rope_head_dim is {shape.qk_rope_head_dim}, but rotation needs it even")
        if indexer is not None and shape.q_lora_rank is None:
            raise CheckpointError(
                f"config.json has no q_lora_rank, but the indexer of {family} reads the query latent"
            )
        if indexer is not None and indexer.rope_dim > indexer.head_dim:
            raise CheckpointError(
                f"index_head_dim is {indexer.head_dim}, but its first {indexer.rope_dim} dims are to be rotated"
            )
        return shape

    @property
    def qk_head_dim(self) -> int:
        """Dims of a query head before absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values that a layer caches of a token for attention: the latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """What the published models leave at one value is not implemented for others."""
    family = config["model_type"]
    for key, only in (("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if config.get(key, only) != only:
            raise CheckpointError(
                f"config.json has {key} {config[key]!r}, but {family} is supported with {only!r} only"
            )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise CheckpointError(f"config.json sets {key}, which {family} here does not have")
    if config["num_key_value_heads"] != config["num_attention_heads"]:
        raise CheckpointError(
            f"config.json has {config['num_key_value_heads']} key heads for {config['num_attention_heads']} "
            "query heads, but latent attention makes one of each from the latent"
        )


def _check_moe(moe: MoEConfig) -> None:
    """Groups and choices fit."""
    if moe.num_experts % moe.num_groups or moe.num_experts < 2 * moe.num_groups:
        raise CheckpointError(
            f"{moe.num_experts} experts do not make {moe.num_groups} equal groups of two or more"
        )
    if moe.groups_per_token > moe.num_groups:
        raise CheckpointError(f"topk_group is {moe.groups_per_token}, but there are {moe.num_groups} groups")
    eligible = moe.num_experts // moe.num_groups * moe.groups_per_token
    if moe.experts_per_token > eligible:
        raise CheckpointError(
            f"num_experts_per_tok is {moe.experts_per_token}, but a token's groups hold {eligible} experts"
        )
