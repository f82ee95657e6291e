"""Tiny GGUF files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB, LAYERS = 4, 2, 16, 64, 96, 50, 2
Kind = gguf.GGMLQuantizationType


def tiny_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """A tiny llama's tensors under GGUF's names, outermost dimension first."""
    rng = np.random.default_rng(seed)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (INNER, HIDDEN),
            f"blk.{i}.ffn_up": (INNER, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INNER),
        }
    return {f"{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


SETTINGS: Mapping[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": VOCAB,
}


def write_gguf(
    path: Path,
    tensors: Mapping[str, np.ndarray] | None = None,
    *,
    kinds: Callable[[str], Kind] = lambda name: Kind.F32,
    arch: str = "llama",
    endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **changed: Any,
) -> Path:
    """Write a tiny llama. `changed` replaces settings; a dot is written as two underscores, and None removes a setting."""
    writer = gguf.GGUFWriter(path, arch, endianess=endian)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_array("tokenizer.ggml.tokens", [f"<{i}>" for i in range(VOCAB)])
    writer.add_array("tokenizer.ggml.scores", [0.5] * VOCAB)
    writer.add_array("general.languages", ["en", "fr"])
    for key, value in {
        **SETTINGS,
        **{key.replace("__", "."): value for key, value in changed.items()},
    }.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, numbers in (tiny_tensors() if tensors is None else tensors).items():
        kind = kinds(name) if numbers.ndim > 1 else Kind.F32
        if numbers.dtype == np.uint8:  # already encoded
            writer.add_tensor(name, numbers, raw_dtype=kind)
        elif kind is Kind.F32:
            writer.add_tensor(name, numbers)
        elif kind is Kind.F16:
            writer.add_tensor(name, numbers.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
