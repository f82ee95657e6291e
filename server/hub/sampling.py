"""How a model's makers say that it should be sampled, for requests that do not say it themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.config import SamplingDefaults
from server.hub.catalogue import CODER_MODEL, DEFAULT_MODEL
from server.text.gguf import GGUFError, read_metadata
from server.text.loading import read_json
from server.text.tokenizer import TokenizerError

NAMED = {
    # SmolLM2's model card. `tests/e2e/test_defaults.py` counts its right answers.
    DEFAULT_MODEL: SamplingDefaults(temperature=0.2, top_p=0.9),
    # The generation_config.json of Qwen2.5-Coder-1.5B-Instruct, without its repetition penalty: code repeats itself.
    CODER_MODEL: SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
}
"""For models that have a name here, where their files say nothing."""

_GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}
"""The names that llama.cpp's converter writes them under."""

_BOUNDS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-9, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
}


def read_sampling(weights: Path, name: str) -> SamplingDefaults:
    """Return a model's own defaults: of its generation_config.json or GGUF metadata, else of `NAMED`.

    A value that is out of its bounds, or no number, is left out. Files that cannot be read have no defaults.
    """
    try:
        if weights.is_file():
            facts = read_metadata(weights)
            given = {field: facts.get(key) for field, key in _GGUF_KEYS.items()}
        else:
            given = {**read_json(weights / "generation_config.json")}
    except (GGUFError, TokenizerError, OSError):
        return SamplingDefaults()
    own = _valid(given)
    return SamplingDefaults(**own) if own else NAMED.get(name, SamplingDefaults())


def _valid(given: Mapping[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for field, (low, high) in _BOUNDS.items():
        value = given.get(field)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and is_number and low <= value <= high:
            own[field] = int(value) if field == "top_k" else float(value)
    return own
