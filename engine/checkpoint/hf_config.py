"""A checkpoint's config with every default filled in, under the names of Hugging Face's config.json.

Llama family: model_type, architectures, hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads, num_key_value_heads, head_dim, vocab_size, max_position_embeddings, rms_norm_eps,
rope_theta, rope_scaling (None, or a mapping with `rope_type`), tie_word_embeddings, hidden_act,
attention_bias, mlp_bias.

DeepSeek family (deepseek_v3, deepseek_v32, glm_moe_dsa): of the above all but mlp_bias, and q_lora_rank (may be
None), kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, n_routed_experts, n_shared_experts,
num_experts_per_tok, moe_intermediate_size, n_group, topk_group, norm_topk_prob, routed_scaling_factor,
mlp_layer_types (one a layer, `dense` or `sparse`), rope_interleave, num_nextn_predict_layers; with an indexer
also index_n_heads, index_head_dim, index_topk, indexer_rope_interleave, indexer_types (one a layer, `full` or
`shared`).

Other keys of the file pass through as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.checkpoint.quantisation import check_quantisation
from engine.errors import CheckpointError


def normalise(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config.json's object and fill in what its family leaves to defaults.

    Args:
        raw: the object as it was read
        where: the file, for messages

    Raises:
        CheckpointError: an unknown model_type, an unknown kind of quantised weights, or a field that is missing or makes no sense.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {family!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    check_quantisation(raw, where)
    return FAMILIES[family](raw, where)


def _llama(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The llama family; defaults as transformers' LlamaConfig has them."""
    heads = _count(raw, "num_attention_heads", where)
    hidden = _count(raw, "hidden_size", where)
    theta, scaling = _rope(raw, where)
    return {
        **{key: value for key, value in raw.items() if key != "rope_parameters"},
        "architectures": raw.get("architectures") or ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": _count(raw, "intermediate_size", where),
        "num_hidden_layers": _count(raw, "num_hidden_layers", where),
        "num_attention_heads": heads,
        "num_key_value_heads": _count(raw, "num_key_value_heads", where, heads),
        "head_dim": _count(raw, "head_dim", where, hidden // heads),
        "vocab_size": _count(raw, "vocab_size", where),
        "max_position_embeddings": _count(raw, "max_position_embeddings", where, 2048),
        "rms_norm_eps": _positive(raw, "rms_norm_eps", where, 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
    }


def _deepseek(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """DeepSeek-V3 and its relatives; sizes must be given, defaults elsewhere as in transformers' configs."""
    family = str(raw["model_type"])
    defaults = _DEEPSEEK[family]
    layers = _count(raw, "num_hidden_layers", where)
    heads = _count(raw, "num_attention_heads", where)
    theta, scaling = _rope(raw, where)
    rope_dim = _count(raw, "qk_rope_head_dim", where)
    config = {
        **{key: value for key, value in raw.items() if key not in ("rope_parameters", "num_mtp_layers")},
        "architectures": raw.get("architectures") or [defaults.architecture],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": _count(raw, "num_key_value_heads", where, heads),
        "head_dim": rope_dim,  # the part of a head that is rotated, as transformers has it
        "qk_rope_head_dim": rope_dim,
        "q_lora_rank": None if raw.get("q_lora_rank") is None else _count(raw, "q_lora_rank", where),
        "max_position_embeddings": _count(raw, "max_position_embeddings", where, defaults.max_positions),
        "rms_norm_eps": _positive(raw, "rms_norm_eps", where, defaults.rms_norm_eps),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_interleave": _flag(raw, "rope_interleave", where, True),
        "tie_word_embeddings": _flag(raw, "tie_word_embeddings", where, False),
        "hidden_act": str(raw.get("hidden_act", "silu")),
        "attention_bias": _flag(raw, "attention_bias", where, False),
        "n_shared_experts": _count(raw, "n_shared_experts", where, 1),
        "n_group": _count(raw, "n_group", where, defaults.n_group),
        "topk_group": _count(raw, "topk_group", where, defaults.topk_group),
        "norm_topk_prob": _flag(raw, "norm_topk_prob", where, True),
        "routed_scaling_factor": _positive(raw, "routed_scaling_factor", where, 2.5),
        "mlp_layer_types": _mlp_types(raw, where, layers),
        "num_nextn_predict_layers": _count(
            {"num_nextn_predict_layers": raw.get("num_nextn_predict_layers", raw.get("num_mtp_layers"))},
            "num_nextn_predict_layers", where, 0, least=0,
        ),
    }  # fmt: skip
    for key in _DEEPSEEK_SIZES:
        config[key] = _count(raw, key, where)
    if defaults.index_n_heads is not None:
        config["index_n_heads"] = _count(raw, "index_n_heads", where, defaults.index_n_heads)
        config["index_head_dim"] = _count(raw, "index_head_dim", where, 128)
        config["index_topk"] = _count(raw, "index_topk", where, 2048)
        config["indexer_rope_interleave"] = _flag(
            raw, "indexer_rope_interleave", where, defaults.indexer_rope_interleave
        )
        config["indexer_types"] = _indexer_types(raw, where, layers)
    return config


_DEEPSEEK_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "num_experts_per_tok",
)


@dataclass(frozen=True)
class _DeepseekDefaults:
    """Where the members of the family differ in what they leave unsaid."""

    architecture: str
    max_positions: int
    rms_norm_eps: float
    n_group: int
    topk_group: int
    index_n_heads: int | None = None  # None: no indexer
    indexer_rope_interleave: bool = False


_DEEPSEEK: Mapping[str, _DeepseekDefaults] = {
    "deepseek_v3": _DeepseekDefaults("DeepseekV3ForCausalLM", 4096, 1e-6, 8, 4),
    "deepseek_v32": _DeepseekDefaults("DeepseekV32ForCausalLM", 163840, 1e-6, 8, 4, index_n_heads=64),
    "glm_moe_dsa": _DeepseekDefaults(
        "GlmMoeDsaForCausalLM", 202752, 1e-5, 1, 1, index_n_heads=32, indexer_rope_interleave=True
    ),
}


def _mlp_types(raw: Mapping[str, Any], where: str, layers: int) -> list[str]:
    """`dense` or `sparse` of each layer: given as a list, or as the number of dense layers at the start."""
    if raw.get("mlp_layer_types") is not None:
        return _layer_list(raw, "mlp_layer_types", where, layers, ("dense", "sparse"))
    frequency = raw.get("moe_layer_freq")
    if frequency not in (None, 1):
        raise CheckpointError(f"{where} has moe_layer_freq {frequency!r}, but only 1 is supported")
    dense = min(_count(raw, "first_k_dense_replace", where, 3, least=0), layers)
    return ["dense"] * dense + ["sparse"] * (layers - dense)


def _indexer_types(raw: Mapping[str, Any], where: str, layers: int) -> list[str]:
    """`full` or `shared` of each layer.

    A layer that shares reads the tokens that the last full layer before it selected (IndexCache, arXiv
    2603.12201). Given as a list, as a pattern of F and S, or by `index_topk_freq` and
    `index_skip_topk_offset`; given not at all, every layer has its own indexer.
    """
    if raw.get("indexer_types") is not None:
        types = _layer_list(raw, "indexer_types", where, layers, ("full", "shared"))
    elif isinstance(pattern := raw.get("index_topk_pattern"), str):
        letters = {"pattern": [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]}
        types = _layer_list(letters, "pattern", f"{where} (index_topk_pattern)", layers, ("full", "shared"))
    elif pattern is not None:
        types = _layer_list(raw, "index_topk_pattern", where, layers, ("full", "shared"))
    else:
        every = _count(raw, "index_topk_freq", where, 1)
        offset = _count(raw, "index_skip_topk_offset", where, 2, least=0)
        types = ["shared" if max(i - offset + 1, 0) % every else "full" for i in range(layers)]
    if types[0] != "full":
        raise CheckpointError(f"{where} lets layer 0 share a selection, but there is no layer before it")
    return types


def _layer_list(
    raw: Mapping[str, Any], key: str, where: str, layers: int, allowed: tuple[str, ...]
) -> list[str]:
    value = raw[key]
    if not isinstance(value, list) or len(value) != layers or any(item not in allowed for item in value):
        raise CheckpointError(
            f"{where} has {key} {value!r:.80}, which is not a list of {' or '.join(allowed)} "
            f"for each of the {layers} layers"
        )
    return list(value)


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "llama": _llama,
    **dict.fromkeys(_DEEPSEEK, _deepseek),
}
"""`model_type` -> how its config is normalised."""


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} has rope_scaling {found!r}, which is not an object")
    scaling = dict(found)
    # Two generations of the format: the base moved into the object, and `type` became `rope_type`.
    theta = _positive(
        {"rope_theta": scaling.pop("rope_theta", raw.get("rope_theta"))}, "rope_theta", where, 1e4
    )
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    scaling.pop("type", None)
    fraction = scaling.pop("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if fraction not in (None, 1, 1.0):
        raise CheckpointError(
            f"{where} rotates only a part of each head (partial_rotary_factor), which is not supported"
        )
    if kind == "default":
        return theta, None
    return theta, {"rope_type": str(kind), **scaling}


def _count(
    raw: Mapping[str, Any], key: str, where: str, default: int | None = None, *, least: int = 1
) -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{where} lacks {key!r}, which a {raw.get('model_type')} model needs")
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise CheckpointError(f"{where} has {key} {value!r}, which is not {kind}")
    return value


def _flag(raw: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} has {key} {value!r}, which is not true or false")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise CheckpointError(f"{where} has {key} {value!r}, which is not a positive number")
    return float(value)
