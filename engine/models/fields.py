"""Reads and checks single fields of a config.json, for the configs of all families.

`where` is the file, for messages. Each function raises CheckpointError if its field is missing or makes no sense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError


def rope(raw: Mapping[str, Any], where: str, max_positions: int) -> tuple[float, dict[str, Any] | None]:
    """Read (base, scaling) from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling`.

    The scaling is None or a mapping with `rope_type`. As in transformers, the original length of YaRN and Llama 3 is
    the config's field, or else the scaling's, or else `max_positions`.
    """
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where} has rope_scaling {found!r}, which is not an object")
    scaling = dict(found)
    # There are two versions of the format. In the newer one the base is in the object, and `type` is `rope_type`.
    theta = positive(
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
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        scaling[key] = raw.get(key) or scaling.get(key) or max_positions
    return theta, {"rope_type": str(kind), **scaling}


def count(raw: Mapping[str, Any], key: str, where: str, default: int | None = None, *, least: int = 1) -> int:
    """Read an integer of at least `least`. Without a default the field must be there."""
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"{where} lacks {key!r}, which a {raw.get('model_type')} model needs")
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise CheckpointError(f"{where} has {key} {value!r}, which is not {kind}")
    return value


def flag(raw: Mapping[str, Any], key: str, where: str, default: bool) -> bool:
    """Read true or false."""
    value = raw.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CheckpointError(f"{where} has {key} {value!r}, which is not true or false")
    return value


def positive(raw: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """Read a number above 0."""
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise CheckpointError(f"{where} has {key} {value!r}, which is not a positive number")
    return float(value)


def layer_list(
    raw: Mapping[str, Any], key: str, where: str, layers: int, allowed: tuple[str, ...]
) -> tuple[str, ...]:
    """Read a list with one word of `allowed` for each layer."""
    value = raw[key]
    if not isinstance(value, list) or len(value) != layers or any(item not in allowed for item in value):
        raise CheckpointError(
            f"{where} has {key} {value!r:.80}, which is not a list of {' or '.join(allowed)} "
            f"for each of the {layers} layers"
        )
    return tuple(value)
