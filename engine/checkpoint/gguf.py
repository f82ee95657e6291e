"""A GGUF file as a source: translates its names, metadata and row order to Hugging Face's. `gguf_file` reads the file.

Metadata that would change what the model computes is either translated or refused, never ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.checkpoint.gguf_file import GGUFFile
from engine.errors import CheckpointError
from engine.memory.quantised import Kind, Quantised
from engine.memory.superblocks import Superblocks

Number = TypeVar("Number", bound=np.generic)

ARCHITECTURES: Mapping[str, bool] = {"llama": True, "qwen2": False, "qwen3": False}
"""`general.architecture`, which is also the `model_type` -> whether neighbouring rows of queries and keys are pairs."""

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROPE_FREQS = "rope_freqs.weight"  # Llama 3's scaling; GGUF has it as a tensor, Hugging Face as settings

_KNOWN = frozenset(
    {
        "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size",
        "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
        "attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base",
        "rope.scale_linear", "rope.scaling.type", "rope.scaling.factor",
        "rope.scaling.original_context_length", "rope.scaling.finetuned",
    }
)  # fmt: skip
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "tensor_data_layout": ("Meta AI original pth",),  # what llama's converters write; it changes nothing
    "rope.scaling.attn_factor": (1.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
}
"""Settings that are accepted only with these values, which change nothing."""


class GGUFSource:
    """A model in one GGUF file."""

    def __init__(self, path: Path) -> None:
        """Open the file and translate its header.

        Raises:
            CheckpointError: it is damaged, is not a language model, has an unknown architecture, or asks for
                something that is not supported.
        """
        self._file = GGUFFile(path)
        _check_kind(self._file)
        tensors = self._file.tensors
        self._stored = {_hf_name(name): name for name in tensors if name != _ROPE_FREQS}
        self.config: Mapping[str, Any] = _config(self._file, self._stored)
        kinds = sorted({place.kind.name for place in tensors.values()})
        self.description = f"{path.name} (GGUF, {', '.join(kinds)})"

    def names(self) -> frozenset[str]:
        """Every tensor except Llama 3's rope factors, which are in the config."""
        return frozenset(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.tensors[self._stored_name(name)].shape

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor; a quantised one is dequantised to float32 first."""
        numbers = self._in_order(name, self._file.read(self._stored_name(name)))
        if not numbers.flags.writeable:
            numbers = numbers.copy()  # because torch has no read-only tensors
        return torch.from_numpy(numbers).to(dtype)

    def quantised_kind(self, name: str) -> Kind | None:
        return self._file.quantised_kind(self._stored_name(name))

    def read_quantised(self, name: str) -> Quantised | Superblocks | None:
        found = self._file.quantised(self._stored_name(name))
        if found is None or self._interleaved_heads(name) is None:
            return found
        return found.with_arrays(
            None if array is None else self._in_order(name, array) for array in found.arrays()
        )

    def _in_order(self, name: str, rows: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """Put a tensor's rows into Hugging Face's order."""
        heads = self._interleaved_heads(name)
        if heads is None:
            return rows
        # For rotation GGUF pairs neighbours (2i, 2i + 1), and Hugging Face pairs (i, i + D/2).
        if rows.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self._file.path} has tensor {name} with {rows.shape[0]} rows, "
                f"which {heads} heads of even size cannot share"
            )
        pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    def _stored_name(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise CheckpointError(f"{self._file.path} has no tensor {name}") from None

    def _interleaved_heads(self, name: str) -> int | None:
        if not ARCHITECTURES[self.config["model_type"]]:
            return None
        if ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        if ".self_attn.k_proj." in name:
            return int(self.config["num_key_value_heads"])
        return None


def _hf_name(name: str) -> str:
    """Return Hugging Face's name of a tensor. An unknown tensor keeps its name, and is then reported as unused."""
    match = _LAYER_NAME.fullmatch(name)
    if match is not None and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    stem, _, part = name.rpartition(".")
    return f"{_TOP[stem]}.{part}" if stem in _TOP else name


def _check_kind(file: GGUFFile) -> None:
    """Refuse a file that is not one whole model of a known architecture."""
    found = file.metadata.get("general.architecture")
    if found not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path} has architecture {found!r}, which is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(f"{file.path} is a GGUF file of type {kind!r}; give the model itself")
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            f"{file.path} is one part of a model split into {file.metadata['split.count']} files; "
            "join them first with llama-gguf-split --merge"
        )
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{found}.")
        if name == key or name in _KNOWN or value in _NEUTRAL.get(name, ()):
            continue
        shown = f"{value!r:.60}"
        raise CheckpointError(f"{file.path} sets {key} = {shown}, which is not supported")


def _config(file: GGUFFile, names: Mapping[str, str]) -> dict[str, Any]:
    """Translate the metadata to the object of a config.json."""
    meta = _Metadata(file)
    heads, hidden = meta.count("attention.head_count"), meta.count("embedding_length")
    rotated = meta.count("rope.dimension_count", hidden // heads)
    head_dim = meta.count("attention.key_length", rotated)
    for key, value in (("attention.value_length", head_dim), ("rope.dimension_count", head_dim)):
        if meta.count(key, value) != value:
            raise CheckpointError(
                f"{file.path} sets {meta.key(key)} = {meta.count(key)}, but heads have {head_dim} dimensions; "
                "only heads of one size that are rotated whole are supported"
            )
    theta = meta.number("rope.freq_base", 10000.0)
    embedding = file.tensors.get("token_embd.weight")
    return {
        "model_type": meta.architecture,
        "hidden_size": hidden,
        "intermediate_size": meta.count("feed_forward_length"),
        "num_hidden_layers": meta.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": meta.count("vocab_size", None if embedding is None else embedding.shape[0]),
        "max_position_embeddings": meta.count("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(meta, theta, head_dim),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
    }


class _Metadata:
    """The settings of the file's architecture. Each is checked when it is read."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata["general.architecture"])

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def get(self, name: str) -> Any:
        return self.file.metadata.get(self.key(name))

    def count(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{self.file.path} sets {self.key(name)} = {value!r:.60}, not one positive integer"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Read a float32 as the shortest decimal that stands for it, as in a config.json: 1e-05."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError(
                f"{self.file.path} sets {self.key(name)} = {value!r:.60}, not a positive number"
            )
        return float(str(np.float32(value)))

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(
                f"{self.file.path} lacks {self.key(name)}, which a {self.architecture} model needs"
            )
        return value


def _rope_scaling(meta: _Metadata, theta: float, dim: int) -> dict[str, Any] | None:
    """Translate the settings that stretch the rotation to the `rope_scaling` of a config.json."""
    kind = meta.get("rope.scaling.type")
    key = "rope.scaling.factor" if meta.get("rope.scaling.factor") is not None else "rope.scale_linear"
    # A factor without a type is linear, because such files are older than the other types.
    factor = None if kind == "none" or not meta.get(key) else meta.number(key)
    stored = _ROPE_FREQS in meta.file.tensors
    if stored and factor is None and kind in (None, "none"):
        return _llama3(meta.file, theta, dim)
    if not stored and kind in (None, "none", "linear"):
        return None if factor in (None, 1.0) else {"rope_type": "linear", "factor": factor}
    if not stored and kind == "yarn" and factor is not None:
        original = meta.count("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    also = f" and a tensor {_ROPE_FREQS}" if stored else ""
    raise CheckpointError(
        f"{meta.file.path} has rope scaling of type {kind!r} with factor {factor}{also}, which is not supported; "
        f"supported: none, linear, yarn with a factor, or llama3 as {_ROPE_FREQS} alone"
    )


def _llama3(file: GGUFFile, theta: float, dim: int) -> dict[str, Any] | None:
    """Find Llama 3's settings from the factors in the file.

    In general the factors do not determine the settings. But Llama 3.1 to 3.3 share three of the four settings, and the
    fourth is the largest factor. So these are tried, and the file is refused if they do not give its factors.
    """
    factors = file.read(_ROPE_FREQS).astype(np.float64)
    if factors.shape == (dim // 2,) and np.all(factors == 1):
        return None
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    turns = original * theta ** (-np.arange(0, dim, 2) / dim) / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    # The file's factors were computed in float32, and factors between the bounds lose a few digits.
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise CheckpointError(
            f"{file.path} has a tensor {_ROPE_FREQS} that is not Llama 3's scaling with "
            f"low_freq_factor {low:g}, high_freq_factor {high:g} and {original} original positions; "
            "other factors are not supported"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
