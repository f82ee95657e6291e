"""A checkpoint's config with every default filled in, under the names of Hugging Face's config.json.

Llama family: model_type, architectures, hidden_size, intermediate_size, num_hidden_layers,
num_attention_heads, num_key_value_heads, head_dim, vocab_size, max_position_embeddings, rms_norm_eps,
rope_theta, rope_scaling (None, or a mapping with `rope_type`), tie_word_embeddings, hidden_act,
attention_bias, mlp_bias. Other keys of the file pass through as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import CheckpointError


def normalise(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check a config.json's object and fill in what its family leaves to defaults.

    Args:
        raw: the object as it was read
        where: the file, for messages

    Raises:
        CheckpointError: an unknown model_type, quantised weights, or a field that is missing or makes no sense.
    """
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {family!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{where} describes quantised weights (quantization_config), which are not supported in this format; "
            "use the unquantised checkpoint or a GGUF file of the model"
        )
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


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], str], dict[str, Any]]] = {
    "llama": _llama,
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


def _count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{where} lacks {key!r}, which a {raw.get('model_type')} model needs")
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where} has {key} {value!r}, which is not a positive integer")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise CheckpointError(f"{where} has {key} {value!r}, which is not a positive number")
    return float(value)
