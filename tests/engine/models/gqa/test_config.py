"""The config of the llama family: defaults as in transformers, both generations of rope settings, clear refusals."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from transformers import LlamaConfig

from engine.errors import CheckpointError
from engine.models import read_config
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.family import Gqa

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
}  # fmt: skip


def read(kind: Any = "llama", **changed: Any) -> GqaConfig:
    raw = {key: value for key, value in {"model_type": kind, **SIZES, **changed}.items() if value is not None}
    family = read_config(raw, "config.json")
    assert isinstance(family, Gqa)
    return family.config


def test_what_a_config_leaves_out_is_as_in_transformers() -> None:
    found, defaults = read(), LlamaConfig(**SIZES)
    assert (found.num_kv_heads, found.head_dim) == (defaults.num_key_value_heads, defaults.head_dim)
    assert (found.rms_norm_eps, found.max_positions) == (
        defaults.rms_norm_eps,
        defaults.max_position_embeddings,
    )
    assert found.tied == defaults.tie_word_embeddings
    assert defaults.rope_parameters is not None
    assert found.rope_theta == defaults.rope_parameters["rope_theta"] == 10000.0
    assert found.rope_scaling is None


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changed", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            5e5,
            {"rope_type": "llama3", **LLAMA3},
        ),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            5e5,
            {"rope_type": "llama3", **LLAMA3},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
            1e4,
            {"rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_both_generations_of_rope_settings(changed: dict[str, Any], theta: float, scaling: object) -> None:
    config = read(**changed)
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "gpt2"}, "model_type 'gpt2', which is not supported; supported: .*llama"),
        ({"kind": 0}, "model_type 0, which is not supported; supported: .*llama"),
        ({"kind": ["llama"]}, r"model_type \['llama'\], which is not supported"),
        ({"hidden_size": None}, "lacks 'hidden_size', which a llama model needs"),
        ({"hidden_size": "32"}, "hidden_size '32', which is not a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0, which is not a positive integer"),
        ({"num_key_value_heads": True}, "num_key_value_heads True, which is not a positive integer"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1, which is not a positive number"),
        ({"rope_parameters": None, "rope_theta": "big"}, "rope_theta 'big', which is not a positive number"),
        ({"rope_parameters": 5}, "rope_scaling 5, which is not an object"),
        ({"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
    ],
)
def test_a_config_that_makes_no_sense(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read(**changed)
    assert str(caught.value).startswith("config.json ")


@pytest.mark.parametrize(
    ("kind", "changed", "windows"),
    [
        ("llama", {"sliding_window": 9}, (None, None)),  # transformers knows no such field there
        ("mistral", {}, (4096, 4096)),
        ("mistral", {"sliding_window": 9}, (9, 9)),
        ("mistral", {"sliding_window": 4096, "max_position_embeddings": 4096}, (None, None)),
        ("qwen2", {"sliding_window": 9, "max_window_layers": 0}, (None, None)),
        ("qwen2", {"sliding_window": 9, "max_window_layers": 1, "use_sliding_window": True}, (None, 9)),
        ("qwen3", {"sliding_window": 9, "use_sliding_window": True}, (None, None)),  # from layer 28 on
        (
            "qwen3",
            {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
            (4096, None),
        ),
    ],
)
def test_windows_are_those_of_transformers(
    kind: str, changed: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    assert read(kind, **changed).windows == windows


def test_a_window_that_is_null_is_none() -> None:
    raw = {"model_type": "mistral", **SIZES, "sliding_window": None}
    assert GqaConfig.read(raw, "config.json").windows == (None, None)


def test_layers_of_windows_without_a_window_are_refused() -> None:
    with pytest.raises(CheckpointError, match="layers of sliding_attention, but no sliding_window in use"):
        read("qwen2", layer_types=["sliding_attention"] * 2)


@pytest.mark.parametrize("top", [{}, {"original_max_position_embeddings": 77}])
@pytest.mark.parametrize("said", [{}, {"original_max_position_embeddings": 99}])
def test_the_original_length_of_yarn_is_that_of_transformers(
    top: dict[str, Any], said: dict[str, Any]
) -> None:
    rope: dict[str, Any] = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, **said}
    expected = LlamaConfig(**SIZES, **top, rope_parameters=dict(rope))
    expected.standardize_rope_params()  # as its rotation does before it reads them
    found = read(**top, rope_parameters=rope).rope_scaling
    assert found is not None
    assert expected.rope_parameters is not None
    key: Literal["original_max_position_embeddings"] = "original_max_position_embeddings"
    assert found[key] == expected.rope_parameters[key]
