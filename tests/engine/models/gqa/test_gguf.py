"""GGUF files of the family's members, named as llama.cpp's own package names tensors: logits are those of the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from engine.checkpoint.overlay import base_fingerprint
from engine.checkpoint.source import open_source
from tests.engine.kit import Lab, tiny_checkpoint
from tests.engine.models.gqa.test_members import DENSE, oracle, tokens_of, traffic

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}


def neighbours(numbers: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as llama.cpp's converter orders a llama's: pairs side by side."""
    halves = numbers.reshape(heads, 2, -1, *numbers.shape[1:])
    return halves.swapaxes(1, 2).reshape(numbers.shape)


def convert(
    model: Any,
    path: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write the model's weights, or `tensors` in their place, as one GGUF file, with matrices of one kind."""
    c = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[c.model_type], c.num_hidden_layers)
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if getattr(c, "head_dim", None):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        if c.model_type == "llama":
            writer.add_rope_dimension_count(c.head_dim)
    for name, tensor in (model.state_dict() if tensors is None else tensors).items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        numbers = tensor.numpy()
        if c.model_type == "llama" and ".q_proj." in name:
            numbers = neighbours(numbers, c.num_attention_heads)
        elif c.model_type == "llama" and ".k_proj." in name:
            numbers = neighbours(numbers, c.num_key_value_heads)
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert to is not None, name
        own = kind if numbers.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(to, gguf.quantize(np.ascontiguousarray(numbers), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "llama", "attention_bias": True, "mlp_bias": True},
        {"kind": "qwen2"},
        {"kind": "qwen2", "tie_word_embeddings": True},
        {"kind": "qwen3", "head_dim": 16},
        {"kind": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    ],
    ids=lambda changes: ", ".join(f"{key} {value}" for key, value in changes.items()),
)
def test_logits_are_those_of_the_model_that_was_converted(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "folder", **changes)
    path = convert(model, tmp_path / "model.gguf")
    lab = Lab(path)
    assert lab.built.unused_tensors == ()
    run = traffic(lab)
    for request, tokens in run.tokens.items():
        assert run.error(request, oracle(model, tokens)) < DENSE
    folder, file = open_source(tmp_path / "folder"), open_source(path)
    for name in folder.names():
        assert torch.equal(folder.read(name, torch.float32), file.read(name, torch.float32)), name
    assert base_fingerprint(folder) == base_fingerprint(file)  # an overlay of one is one of the other


@pytest.mark.parametrize("part", ["q_norm.weight", "k_norm.weight", "q_proj.bias"])
def test_what_is_forgotten_shows(part: str, tmp_path: Path) -> None:
    """The comparison above can fail: each of these changes the logits."""
    model = tiny_checkpoint(tmp_path / "folder", kind="qwen3", head_dim=16, attention_bias=True)
    changed = {
        name: (torch.ones_like(tensor) if "norm" in name else torch.zeros_like(tensor))
        if name.endswith(part)
        else tensor
        for name, tensor in model.state_dict().items()
    }
    run = Lab(convert(model, tmp_path / "model.gguf", changed)).run()
    run.submit("a", tokens_of(1, 60), 1)
    run.finish()
    assert run.error("a", oracle(model, run.tokens["a"])) > 0.01
