"""Hugging Face folders: what transformers saved is read back, and every fault is one clear sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from engine.checkpoint.source import Source, open_source
from engine.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def save_tiny(folder: Path, *, seed: int = 0, shards: bool = False, **changed: Any) -> LlamaForCausalLM:
    """Save a tiny random llama as transformers does."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(HfConfig(**{**fields, **changed}))
    model.save_pretrained(folder, max_shard_size="10KB" if shards else "5GB")
    return model


def edit(path: Path, **changed: Any) -> None:
    """Change fields of a JSON file; None removes a field."""
    content = {**json.loads(path.read_text()), **changed}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "tiny", shards=True)
    return tmp_path / "tiny"


def assert_same(source: Source, model: LlamaForCausalLM) -> None:
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert source.names() == expected.keys()
    for name, tensor in expected.items():
        assert source.shape(name) == tensor.shape
        assert torch.equal(source.read(name, torch.float32), tensor)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_what_was_saved_is_read(tmp_path: Path, shards: bool, tied: bool) -> None:
    model = save_tiny(tmp_path, shards=shards, tie_word_embeddings=tied)
    assert (tmp_path / INDEX).exists() == shards
    source = open_source(tmp_path)
    assert_same(source, model)
    assert source.config["tie_word_embeddings"] is tied
    assert "safetensors" in source.description


def test_another_dtype_and_memory_of_its_own(single: Path) -> None:
    name, source = "model.layers.0.mlp.up_proj.weight", open_source(single)
    stored = load_file(single / "model.safetensors")[name]
    assert torch.equal(source.read(name, torch.bfloat16), stored.bfloat16())
    source.read(name, torch.float32).zero_()
    assert torch.equal(source.read(name, torch.float32), stored)


def test_one_file_of_another_name_and_an_overlay_beside_it(single: Path) -> None:
    shutil.move(single / "model.safetensors", single / "weights.safetensors")
    (single / "indexer.safetensors").write_bytes(b"not looked at")
    assert "model.norm.weight" in open_source(single).names()


def test_a_tensor_that_the_index_forgot_is_kept(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    by_shard: dict[str, list[str]] = {}
    for name, shard in index["weight_map"].items():
        by_shard.setdefault(shard, []).append(name)
    forgotten = next(names for names in by_shard.values() if len(names) > 1)[0]
    del index["weight_map"][forgotten]
    (sharded / INDEX).write_text(json.dumps(index))
    assert forgotten in open_source(sharded).names()


def test_quantised_weights_of_another_kind_are_refused(single: Path) -> None:
    edit(single / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="quantised weights with quant_method 'gptq'") as caught:
        open_source(single)
    assert str(single / "config.json") in str(caught.value)


# ---- files --------------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nope does not exist; give a \.gguf file or a folder"):
        open_source(tmp_path / "nope")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json, which a checkpoint needs"):
        open_source(tmp_path)


def test_a_safetensors_file_instead_of_its_folder(single: Path) -> None:
    with pytest.raises(CheckpointError, match="or the folder that holds config.json"):
        open_source(single / "model.safetensors")


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_config_that_is_no_object(single: Path, content: str, message: str) -> None:
    (single / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        open_source(single)


def test_only_pickles(single: Path) -> None:
    shutil.move(single / "model.safetensors", single / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no \*\.safetensors file \(pickled"):
        open_source(single)


def test_shards_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=r"\*\.safetensors files but no model\.safetensors\.index\.json"
    ):
        open_source(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    shard = weight_map["model.norm.weight"]
    (sharded / shard).unlink()
    with pytest.raises(CheckpointError, match=rf"puts tensor \S+ into {shard}, but there is no such file"):
        open_source(sharded)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit(sharded / INDEX, weight_map={**weight_map, "model.extra.weight": weight_map["model.norm.weight"]})
    with pytest.raises(
        CheckpointError, match=r"puts tensor model\.extra\.weight into .*, but that file does not"
    ):
        open_source(sharded)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", 7])
def test_an_index_that_leaves_the_folder(sharded: Path, shard: object) -> None:
    edit(sharded / INDEX, weight_map={"model.norm.weight": shard})
    with pytest.raises(
        CheckpointError, match=r"puts tensor model\.norm\.weight into .*, which is not a file name"
    ):
        open_source(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"]])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    edit(sharded / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json has no weight_map"):
        open_source(sharded)


@pytest.mark.parametrize(
    ("dtype", "stored"), [(torch.int8, "I8"), (torch.int32, "I32"), (torch.float8_e5m2, "F8_E5M2")]
)
def test_quantised_tensors_are_refused_by_name(single: Path, dtype: torch.dtype, stored: str) -> None:
    path, name = single / "model.safetensors", "model.layers.1.self_attn.v_proj.weight"
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name].to(dtype)}, path)
    source = open_source(single)
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors stores tensor {name} as {stored}, but weights"
    ):
        source.read(name, torch.float32)


def test_a_missing_tensor_is_named(single: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny has no tensor model\.layers\.7\.mlp\.up_proj\.weight"):
        open_source(single).shape("model.layers.7.mlp.up_proj.weight")


def test_a_corrupt_header(single: Path) -> None:
    path = single / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:8] + b"?" + content[9:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        open_source(single)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder, shards=True)
    return {
        path: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or "json" in path.name
    }


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_truncated_anywhere(whole: dict[Path, bytes], data: st.DataObject) -> None:
    """Any one file of the checkpoint, cut at any byte."""
    needed = sorted(path for path in whole if path.name != "generation_config.json")
    path = data.draw(st.sampled_from(needed))
    content = whole[path].rstrip()  # JSON is as whole without its last line break
    try:
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(CheckpointError):
            open_source(path.parent)
    finally:
        path.write_bytes(whole[path])
