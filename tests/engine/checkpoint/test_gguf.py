"""GGUF files: transformers reads the same from them, and every fault is refused."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from engine.checkpoint.gguf import GGUFSource
from engine.checkpoint.loader import load
from engine.checkpoint.source import open_source
from engine.errors import CheckpointError
from engine.layers.rope import inverse_frequencies
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.weights import weight_table
from tests.engine.checkpoint.kit import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    VOCAB,
    Kind,
    tiny_tensors,
    write_gguf,
)

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def assert_same(path: Path) -> None:
    """Names, shapes, numbers and config are those that transformers reads from the file.

    This is what its from_pretrained(gguf_file=...) calls; that one would want accelerate too.
    """
    source = open_source(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(HfConfig(**source.config))  # for its parameters' names only
    with pytest.MonkeyPatch.context() as patch:
        # Its own names are all: transformers would map each submodule's too, slowly.
        patch.setattr(model, "named_children", list)
        loaded = load_gguf_checkpoint(
            str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )
    assert source.names() == loaded["tensors"].keys()
    for name, tensor in loaded["tensors"].items():
        assert source.shape(name) == tensor.shape
        assert torch.equal(source.read(name, torch.float32), tensor), name
    config = {key: value for key, value in loaded["config"].items() if key in source.config}
    assert {
        "hidden_size",
        "head_dim",
        "vocab_size",
        "num_key_value_heads",
        "tie_word_embeddings",
    } < config.keys()
    eps = config.pop("rms_norm_eps")  # transformers has the float32 as it is
    assert source.config["rms_norm_eps"] == pytest.approx(eps, rel=1e-7)
    assert {key: source.config[key] for key in config} == config


def test_default_model_is_what_transformers_reads(default_model: Path) -> None:
    assert_same(default_model)


def test_default_model_loads_whole(default_model: Path) -> None:
    source = open_source(default_model)
    calls: list[tuple[int, int]] = []
    table = weight_table(GqaConfig.read(source.config, "config.json"), None)
    weights, report = load(
        table,
        source,
        dtype=torch.bfloat16,
        device=CPU,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert report.unused == report.replaced == ()
    assert report.num_parameters == 134_515_008
    assert report.num_bytes == 2 * report.num_parameters
    assert all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    assert calls[0] == (0, report.num_bytes)
    assert calls[-1] == (report.num_bytes, report.num_bytes)
    assert calls == sorted(calls)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1])
def test_kinds_are_what_transformers_reads(tmp_path: Path, kind: Kind) -> None:
    assert_same(write_gguf(tmp_path / "tiny.gguf", kinds=lambda name: kind))


def test_k_quants_are_dequantised_by_the_gguf_package(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    block, size = gguf.GGML_QUANT_SIZES[Kind.Q4_K]
    encoded = np.random.default_rng(1).integers(0, 120, (VOCAB, size), np.uint8)  # < 120: finite scales
    tensors["token_embd.weight"] = encoded
    path = write_gguf(
        tmp_path / "k.gguf",
        tensors,
        kinds=lambda name: Kind.Q4_K if name == "token_embd.weight" else Kind.F32,
    )
    source = open_source(path)
    assert source.shape("model.embed_tokens.weight") == (VOCAB, block)
    expected = torch.from_numpy(gguf.dequantize(encoded, Kind.Q4_K))
    assert torch.equal(source.read("model.embed_tokens.weight", torch.float32), expected)


def test_query_and_key_rows_are_half_split(tiny: Path) -> None:
    """Row r of a GGUF head is member r % 2 of pair r // 2. Hugging Face has the first members of all pairs first."""
    stored = tiny_tensors()
    source = open_source(tiny)
    for part, heads in (("q", HEADS), ("k", KV_HEADS)):
        found = source.read(f"model.layers.1.self_attn.{part}_proj.weight", torch.float32).numpy()
        for head in range(heads):
            for row in range(HEAD_DIM):
                to = head * HEAD_DIM + row // 2 + (row % 2) * HEAD_DIM // 2
                assert (found[to] == stored[f"blk.1.attn_{part}.weight"][head * HEAD_DIM + row]).all()


def test_biases_are_permuted_too(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    for i in range(LAYERS):
        tensors[f"blk.{i}.attn_q.bias"] = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    source = open_source(write_gguf(tmp_path / "bias.gguf", tensors))
    assert source.config["attention_bias"] is True
    bias = source.read("model.layers.0.self_attn.q_proj.bias", torch.float32)
    assert bias[:HEAD_DIM].tolist() == [*range(0, HEAD_DIM, 2), *range(1, HEAD_DIM, 2)]


def test_no_output_tensor_means_tied_embeddings(tmp_path: Path, tiny: Path) -> None:
    tensors = tiny_tensors()
    del tensors["output.weight"]
    tied = open_source(write_gguf(tmp_path / "tied.gguf", tensors))
    assert tied.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in tied.names()
    assert open_source(tiny).config["tie_word_embeddings"] is False


def test_what_is_read_is_the_readers_own(tiny: Path) -> None:
    source = open_source(tiny)
    first = source.read("model.norm.weight", torch.float32)
    kept = first.clone()
    first.zero_()
    assert torch.equal(source.read("model.norm.weight", torch.float32), kept)


def test_unknown_tensors_keep_their_names_and_are_reported(tmp_path: Path) -> None:
    tensors = {**tiny_tensors(), "blk.0.ffn_gate_inp.weight": np.ones((8, HIDDEN), np.float32)}
    source = open_source(write_gguf(tmp_path / "more.gguf", tensors))
    _, report = load(
        weight_table(GqaConfig.read(source.config, "config.json"), None),
        source,
        dtype=torch.float32,
        device=CPU,
    )
    assert report.unused == ("blk.0.ffn_gate_inp.weight",)


def test_tokenizer_arrays_are_not_kept(tiny: Path) -> None:
    metadata = GGUFSource(tiny)._file.metadata
    assert metadata["tokenizer.ggml.tokens"] is None
    assert metadata["tokenizer.ggml.scores"] is None
    assert metadata["general.languages"] == ["en", "fr"]


def test_eps_is_the_decimal_that_a_config_would_have(tiny: Path) -> None:
    assert open_source(tiny).config["rms_norm_eps"] == 1e-5


# ---- rope ---------------------------------------------------------------------------------------


def llama3_factors(scaling: Mapping[str, Any], theta: float, dim: int) -> np.ndarray:
    """The content of rope_freqs.weight: by which factor each pair turns more slowly."""
    plain = inverse_frequencies(dim, theta, None)
    return (plain / inverse_frequencies(dim, theta, scaling)).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_factors_become_settings(tmp_path: Path, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    factors = llama3_factors(scaling, 500000.0, HEAD_DIM)
    assert factors.min() == 1
    settings: dict[str, Any] = {"llama.rope.freq_base": 500000.0}
    path = write_gguf(
        tmp_path / "l3.gguf",
        {**tiny_tensors(), "rope_freqs.weight": factors},
        **settings,
    )
    source = open_source(path)
    found = source.config["rope_scaling"]
    assert found == {**scaling, "factor": pytest.approx(factor, rel=1e-6)}
    assert "rope_freqs.weight" not in source.names()


def test_rope_factors_of_one_change_nothing(tmp_path: Path) -> None:
    tensors = {**tiny_tensors(), "rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)}
    assert open_source(write_gguf(tmp_path / "one.gguf", tensors)).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "factors", [np.linspace(1, 7, HEAD_DIM // 2), np.ones(3), np.full(HEAD_DIM // 2, math.nan)]
)
def test_other_rope_factors_are_refused(tmp_path: Path, factors: np.ndarray) -> None:
    tensors = {**tiny_tensors(), "rope_freqs.weight": factors.astype(np.float32)}
    path = write_gguf(tmp_path / "odd.gguf", tensors)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight that is not Llama 3's scaling"):
        open_source(path)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"type": "none"}, None),
        ({"type": "none", "factor": 4.0}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"type": "linear", "factor": 1.0}, None),
        ({"factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rope_scaling_is_translated(tmp_path: Path, changed: dict[str, Any], expected: object) -> None:
    path = write_gguf(
        tmp_path / "rope.gguf", **{f"llama.rope.scaling.{key}": value for key, value in changed.items()}
    )
    assert open_source(path).config["rope_scaling"] == expected


def test_the_older_key_of_linear_scaling_is_translated(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "rope.gguf", llama__rope__scale_linear=4.0)
    assert open_source(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arch": "gpt2"}, "architecture 'gpt2', which is not supported; supported: llama"),
        ({"general__type": "adapter"}, "GGUF file of type 'adapter'; give the model itself"),
        ({"split__count": 3}, r"one part of a model split into 3 files"),
        ({"llama__expert_count": 8}, r"llama\.expert_count = 8, which is not supported"),
        ({"llama__attention__sliding_window": 64}, r"llama\.attention\.sliding_window = 64, which is not"),
        ({"llama__attention__temperature_length": 9}, r"temperature_length = 9, which is not supported"),
        ({"llama__rope__scaling__type": "longrope"}, "rope scaling of type 'longrope'"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling of type 'yarn' with factor None"),
        ({"llama__rope__scaling__attn_factor": 2.0}, r"rope\.scaling\.attn_factor = 2\.0, which is not"),
        (
            {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__factor": 2.0},
            r"lacks llama\.rope\.scaling\.original_context_length",
        ),
        ({"llama__block_count": None}, r"lacks llama\.block_count, which a llama model needs"),
        ({"llama__block_count": 0}, r"llama\.block_count = 0, not one positive integer"),
        ({"llama__block_count": "two"}, r"llama\.block_count = 'two', not one positive integer"),
        ({"llama__attention__head_count": [4, 2]}, r"head_count = \[4, 2\], not one positive integer"),
        ({"llama__rope__freq_base": -1.0}, r"freq_base = -1\.0, not a positive number"),
        ({"llama__attention__layer_norm_rms_epsilon": math.nan}, r"rms_epsilon = nan, not a positive number"),
        (
            {"llama__attention__layer_norm_rms_epsilon": None},
            r"lacks llama\.attention\.layer_norm_rms_epsilon",
        ),
        ({"llama__attention__key_length": 32}, r"rope\.dimension_count = 16, but heads have 32 dimensions"),
        ({"llama__attention__value_length": 32}, r"value_length = 32, but heads have 16 dimensions"),
        ({"general__alignment": 24}, "general.alignment 24, which is not a power of two"),
    ],
)
def test_what_is_not_supported_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    if "general__alignment" in changed:
        path = write_gguf(tmp_path / "x.gguf", general__alignment=32)
        content = path.read_bytes()
        at = content.index(b"general.alignment") + len("general.alignment") + 4
        path.write_bytes(content[:at] + struct.pack("<I", 24) + content[at + 4 :])
    else:
        path = write_gguf(tmp_path / "x.gguf", **changed)
    with pytest.raises(CheckpointError, match=message):
        open_source(path)


def test_neutral_settings_are_accepted(tmp_path: Path) -> None:
    open_source(write_gguf(tmp_path / "x.gguf", llama__expert_count=0, llama__attention__causal=True))


def test_big_endian_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "big.gguf", endian=gguf.GGUFEndian.BIG)
    with pytest.raises(CheckpointError, match=r"versions 2 and 3 are supported, little-endian"):
        open_source(path)


def test_a_kind_that_cannot_be_dequantised_names_tensor_and_kind(tmp_path: Path) -> None:
    _, size = gguf.GGML_QUANT_SIZES[Kind.Q8_K]
    tensors = {**tiny_tensors(), "token_embd.weight": np.zeros((VOCAB, size), np.uint8)}
    path = write_gguf(
        tmp_path / "q.gguf",
        tensors,
        kinds=lambda name: Kind.Q8_K if name == "token_embd.weight" else Kind.F32,
    )
    source = open_source(path)
    with pytest.raises(CheckpointError, match=r"q\.gguf stores tensor token_embd\.weight as Q8_K"):
        source.read("model.embed_tokens.weight", torch.float32)


def test_a_missing_tensor_is_named(tiny: Path) -> None:
    source = open_source(tiny)
    with pytest.raises(
        CheckpointError, match=r"tiny\.gguf has no tensor model\.layers\.9\.mlp\.up_proj\.weight"
    ):
        source.read("model.layers.9.mlp.up_proj.weight", torch.float32)
    with pytest.raises(CheckpointError, match="has no tensor nope"):
        source.shape("nope")


def test_heads_that_do_not_divide_the_rows(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", llama__attention__head_count_kv=3)
    with pytest.raises(CheckpointError, match=r"32 rows, which 3 heads of even size cannot share"):
        open_source(path).read("model.layers.0.self_attn.k_proj.weight", torch.float32)


def test_nan_names_the_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["blk.1.ffn_up.weight"][3, 4] = math.nan
    source = open_source(write_gguf(tmp_path / "x.gguf", tensors))
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values in tensor model\.layers\.1\.mlp\.up_proj"
    ):
        load(
            weight_table(GqaConfig.read(source.config, "config.json"), None),
            source,
            dtype=torch.float32,
            device=CPU,
        )


# ---- folders ------------------------------------------------------------------------------------


def test_a_folder_with_one_gguf(tiny: Path) -> None:
    (tiny.parent / "indexer.safetensors").write_bytes(b"not looked at")
    (tiny.parent / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_source(tiny.parent).description.startswith("tiny.gguf")


def test_a_folder_with_several(tiny: Path) -> None:
    write_gguf(tiny.parent / "other.gguf")
    with pytest.raises(
        CheckpointError, match=r"several \.gguf files \(other\.gguf, tiny\.gguf\); name the one"
    ):
        open_source(tiny.parent)
