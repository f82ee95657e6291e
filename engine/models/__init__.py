"""The model families. `FAMILIES` is the only table of `model_type`. A new relative of a family is one line in it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError

if TYPE_CHECKING:
    from engine.checkpoint.source import Source
    from engine.models.family import Family

FAMILIES: dict[str, str] = {
    "deepseek_v3": "engine.models.mla.family",
    "deepseek_v32": "engine.models.mla.family",
    "glm_moe_dsa": "engine.models.mla.family",
    "llama": "engine.models.gqa.family",
    "mistral": "engine.models.gqa.family",
    "qwen2": "engine.models.gqa.family",
    "qwen3": "engine.models.gqa.family",
}
"""`model_type` of a checkpoint's config -> the module with its `read`. The module is imported when it is needed."""


def read_config(raw: Mapping[str, Any], where: str) -> Family:
    """Read the object of a config.json, with the family of its `model_type`.

    Args:
        raw: the object as it was read
        where: the file, for messages

    Raises:
        CheckpointError: `model_type` is not in the table; or a field is missing, makes no sense, or asks for
            something that the family does not do.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(
            f"{where} has model_type {kind!r}, which is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    family: Family = import_module(FAMILIES[kind]).read(raw, where)
    return family


def read_model(source: Source) -> Family:
    """Read the config of an open checkpoint; raises the errors of `read_config`."""
    return read_config(source.config, source.description)
