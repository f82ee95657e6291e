"""The config of a DeepSeek-V3-family model, read and checked: deepseek_v3 (dense), deepseek_v32, glm_moe_dsa (GLM-5).

The names are those of the papers: arXiv 2412.19437 (V3: MLA, MoE, MTP), arXiv 2512.02556
(V3.2: lightning indexer), arXiv 2602.15763 (GLM-5), arXiv 2603.12201 (cross-layer index sharing).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import CheckpointError
from engine.layers.moe import MoEConfig
from engine.models import fields


@dataclass(frozen=True)
class IndexConfig:
    """The lightning indexer of a checkpoint."""

    num_heads: int
    head_dim: int
    rope_dim: int  # so many first dims of a head are rotated
    rope_interleaved: bool  # False: half-split, as in V3.2; True in GLM-5
    index_top_k: int  # how many tokens it was trained to select


@dataclass(frozen=True)
class _Member:
    """The defaults of config fields, which differ between the members of the family."""

    max_positions: int
    rms_norm_eps: float
    n_group: int
    topk_group: int
    index_n_heads: int | None = None  # None: no indexer
    indexer_rope_interleave: bool = False


_MEMBERS: Mapping[str, _Member] = {
    "deepseek_v3": _Member(4096, 1e-6, 8, 4),
    "deepseek_v32": _Member(163840, 1e-6, 8, 4, index_n_heads=64),
    "glm_moe_dsa": _Member(202752, 1e-5, 1, 1, index_n_heads=32, indexer_rope_interleave=True),
}


@dataclass(frozen=True)
class MlaConfig:
    """The fields of a config.json that decide what the model computes."""

    architecture: str  # model_type
    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of a dense layer's MLP
    num_layers: int
    num_heads: int
    q_lora_rank: int | None  # None: queries are made from the hidden state
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
    moe_layers: tuple[bool, ...]  # one for each layer; False: dense MLP
    indexer: IndexConfig | None  # None: attention is dense
    index_layers: tuple[bool, ...]  # one for each layer; False: uses the last True layer's selection
    num_mtp_layers: int  # as the config says; a checkpoint may leave their tensors out

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> MlaConfig:
        """Read the object of a config.json. Defaults of missing fields are those of transformers.

        Raises:
            CheckpointError: a field is missing, asks for something that this family does not do, or contradicts
                another.
        """
        family = str(raw["model_type"])
        member = _MEMBERS[family]

        def size(key: str, default: int | None = None, *, least: int = 1) -> int:
            return fields.count(raw, key, where, default, least=least)

        _refuse_unknown(raw, where)
        layers, heads, rope_dim = (
            size("num_hidden_layers"),
            size("num_attention_heads"),
            size("qk_rope_head_dim"),
        )
        if size("num_key_value_heads", heads) != heads:
            raise CheckpointError(
                f"{where} has {raw['num_key_value_heads']} key heads for {heads} query heads, "
                "but latent attention makes one of each from the latent"
            )
        if rope_dim % 2:
            raise CheckpointError(f"{where} has qk_rope_head_dim {rope_dim}, but rotation needs it even")
        max_positions = size("max_position_embeddings", member.max_positions)
        theta, scaling = fields.rope(raw, where, max_positions)
        moe = MoEConfig(
            num_experts=size("n_routed_experts"),
            num_shared_experts=size("n_shared_experts", 1),
            experts_per_token=size("num_experts_per_tok"),
            num_groups=size("n_group", member.n_group),
            groups_per_token=size("topk_group", member.topk_group),
            normalise=fields.flag(raw, "norm_topk_prob", where, True),
            scaling=fields.positive(raw, "routed_scaling_factor", where, 2.5),
            intermediate_size=size("moe_intermediate_size"),
        )
        _check_moe(moe)
        q_rank = None if raw.get("q_lora_rank") is None else size("q_lora_rank")
        indexer, index_layers = None, (False,) * layers
        if member.index_n_heads is not None:
            indexer = IndexConfig(
                num_heads=size("index_n_heads", member.index_n_heads),
                head_dim=size("index_head_dim", 128),
                rope_dim=rope_dim,
                rope_interleaved=fields.flag(
                    raw, "indexer_rope_interleave", where, member.indexer_rope_interleave
                ),
                index_top_k=size("index_topk", 2048),
            )
            index_layers = tuple(kind == "full" for kind in _indexer_types(raw, where, layers))
            if q_rank is None:
                raise CheckpointError(
                    f"{where} has no q_lora_rank, but the indexer of {family} reads the query latent"
                )
            if rope_dim > indexer.head_dim:
                raise CheckpointError(
                    f"{where} has index_head_dim {indexer.head_dim}, but its first {rope_dim} dims are to be rotated"
                )
        modules = raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers"))
        return cls(
            architecture=family,
            vocab_size=size("vocab_size"),
            hidden_size=size("hidden_size"),
            intermediate_size=size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            q_lora_rank=q_rank,
            kv_lora_rank=size("kv_lora_rank"),
            qk_nope_head_dim=size("qk_nope_head_dim"),
            qk_rope_head_dim=rope_dim,
            v_head_dim=size("v_head_dim"),
            rms_norm_eps=fields.positive(raw, "rms_norm_eps", where, member.rms_norm_eps),
            max_positions=max_positions,
            rope_theta=theta,
            rope_scaling=scaling,
            rope_interleaved=fields.flag(raw, "rope_interleave", where, True),
            tied=fields.flag(raw, "tie_word_embeddings", where, False),
            moe=moe,
            moe_layers=tuple(kind == "sparse" for kind in _mlp_types(raw, where, layers)),
            indexer=indexer,
            index_layers=index_layers,
            num_mtp_layers=fields.count(
                {"num_nextn_predict_layers": modules}, "num_nextn_predict_layers", where, 0, least=0
            ),
        )

    @property
    def qk_head_dim(self) -> int:
        """Dims of a query head before it is absorbed."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """How many numbers a layer caches of a token for attention: the latent, then the rotated shared key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def _refuse_unknown(raw: Mapping[str, Any], where: str) -> None:
    """Refuse other values of fields that have the same value in all published models."""
    family = raw["model_type"]
    for key, only in (("hidden_act", "silu"), ("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if raw.get(key, only) != only:
            raise CheckpointError(
                f"{where} has {key} {raw[key]!r}, but {family} is supported with {only!r} only"
            )
    for key in ("attention_bias", "mlp_bias"):
        if fields.flag(raw, key, where, False):
            raise CheckpointError(f"{where} sets {key}, which {family} here does not have")


def _mlp_types(raw: Mapping[str, Any], where: str, layers: int) -> tuple[str, ...]:
    """Read `dense` or `sparse` for each layer, from a list or from the number of dense layers at the start."""
    if raw.get("mlp_layer_types") is not None:
        return fields.layer_list(raw, "mlp_layer_types", where, layers, ("dense", "sparse"))
    frequency = raw.get("moe_layer_freq")
    if frequency not in (None, 1):
        raise CheckpointError(f"{where} has moe_layer_freq {frequency!r}, but only 1 is supported")
    dense = min(fields.count(raw, "first_k_dense_replace", where, 3, least=0), layers)
    return ("dense",) * dense + ("sparse",) * (layers - dense)


def _indexer_types(raw: Mapping[str, Any], where: str, layers: int) -> tuple[str, ...]:
    """Read `full` or `shared` for each layer.

    A shared layer reads the tokens that the last full layer before it selected (IndexCache, arXiv 2603.12201). The
    config has a list, or a pattern of F and S, or `index_topk_freq` and `index_skip_topk_offset`. Without any of them
    every layer is full.
    """
    if raw.get("indexer_types") is not None:
        types = fields.layer_list(raw, "indexer_types", where, layers, ("full", "shared"))
    elif isinstance(pattern := raw.get("index_topk_pattern"), str):
        letters = {"pattern": [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]}
        types = fields.layer_list(
            letters, "pattern", f"{where} (index_topk_pattern)", layers, ("full", "shared")
        )
    elif pattern is not None:
        types = fields.layer_list(raw, "index_topk_pattern", where, layers, ("full", "shared"))
    else:
        every = fields.count(raw, "index_topk_freq", where, 1)
        offset = fields.count(raw, "index_skip_topk_offset", where, 2, least=0)
        types = tuple("shared" if max(i - offset + 1, 0) % every else "full" for i in range(layers))
    if types[0] != "full":
        raise CheckpointError(f"{where} lets layer 0 share a selection, but there is no layer before it")
    return types


def _check_moe(moe: MoEConfig) -> None:
    """Check that the numbers of groups and experts fit together."""
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
