"""Indexer overlays: a safetensors file with a lightning indexer for each layer of a base checkpoint.

Tensors, for E = hidden_size of the base, H index heads of d dimensions, in every layer i:

    model.layers.{i}.self_attn.indexer.wq.weight            [H * d, E]
    model.layers.{i}.self_attn.indexer.wk.weight            [d, E]
    model.layers.{i}.self_attn.indexer.k_norm.weight        [d]
    model.layers.{i}.self_attn.indexer.k_norm.bias          [d]
    model.layers.{i}.self_attn.indexer.weights_proj.weight  [H, E]

and, with `adapter_rank` r in the header, for Hq query and Hkv key heads of D dims, the corrections that rows
with a selection add to attention's projections (`engine.layers.low_rank`):

    model.layers.{i}.self_attn.sparse_adapter.qkv.a         [r, E]
    model.layers.{i}.self_attn.sparse_adapter.qkv.b         [(Hq + 2 Hkv) * D, r]
    model.layers.{i}.self_attn.sparse_adapter.o.a           [r, Hq * D]
    model.layers.{i}.self_attn.sparse_adapter.o.b           [E, r]

Matrices may be in 8 bits (`engine.checkpoint.eight_bit`). Any other tensor replaces the base's tensor of that name. The header's metadata, all strings: `format`,
`base_model`, `num_heads`, `head_dim`, `rope_dim`, `default_top_k`, `recipe` (how it was trained), and
optionally `adapter_rank` and `base_sha256`, the `base_fingerprint` of the checkpoint that it was trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint.eight_bit import EightBitFile, shorten
from engine.checkpoint.safetensors import SafetensorsFile
from engine.checkpoint.source import LaidSource, Source, Tensors
from engine.errors import CheckpointError
from engine.protocol import IndexerInfo

FORMAT = "dsa-indexer-overlay/1"
_OWN_NAME = re.compile(r"model\.layers\.\d+\.self_attn\.(indexer|sparse_adapter)\..*")
_SHAPE_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class Overlay:
    """An open overlay that fits its base."""

    info: IndexerInfo
    base_model: str  # the description of the checkpoint that it was trained on
    recipe: str
    replaced: tuple[str, ...]  # tensors of the base that it replaces
    tensors: Tensors

    def over(self, base: Source) -> LaidSource:
        """Lay this overlay over `base`, the checkpoint that it was read for."""
        return LaidSource(base, self.tensors, self.info.source)


def read_overlay(path: Path, base: Source) -> Overlay:
    """Open an overlay and check that it fits `base`.

    Raises:
        CheckpointError: it is damaged, is not an overlay or has another base, or its tensors do not fit its header
            and the base.
    """
    file = SafetensorsFile(path)
    meta = file.metadata
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {meta.get('format')!r} in its header; an overlay has {FORMAT!r}"
        )
    info = IndexerInfo(
        num_heads=_integer(meta, "num_heads", path),
        head_dim=_integer(meta, "head_dim", path),
        rope_dim=_integer(meta, "rope_dim", path),
        default_index_top_k=_integer(meta, "default_top_k", path),
        adapter_rank=_integer(meta, "adapter_rank", path) if "adapter_rank" in meta else 0,
        source=path.name,
    )
    _check_info(info, str(path))
    base_model = meta.get("base_model", "an unnamed checkpoint")
    if "base_sha256" in meta and meta["base_sha256"] != base_fingerprint(base):
        raise CheckpointError(
            f"{path} was trained on {base_model}, whose weights are not those of {base.description}; "
            "serve that checkpoint, or train an overlay for this one"
        )
    tensors = EightBitFile(file)
    replaced = _check_tensors(tensors, info, base, str(path))
    return Overlay(info, base_model, meta.get("recipe", ""), replaced, tensors)


def write_overlay(
    path: Path,
    tensors: Mapping[str, Tensor],
    info: IndexerInfo,
    recipe: str,
    base: Source,
    *,
    eight_bit: bool = False,
) -> None:
    """Write an overlay that `read_overlay` accepts for `base`. An existing file is replaced in one step.

    Args:
        path: the file
        tensors: named and shaped as in the module's docstring, floats, on any device
        info: the indexer's numbers; its `source` is not written
        recipe: how it was trained, in free text
        base: the checkpoint that it was trained on
        eight_bit: whether to store the matrices of indexers and adapters in 8 bits

    Raises:
        CheckpointError: the tensors or numbers are not what an overlay of `base` needs.
    """
    _check_info(info, str(path))
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    if eight_bit:
        own = {name: tensor for name, tensor in stored.items() if _OWN_NAME.fullmatch(name)}
        stored |= shorten(own)
    metadata = {
        "format": FORMAT,
        "base_model": base.description,
        "base_sha256": base_fingerprint(base),
        "num_heads": str(info.num_heads),
        "head_dim": str(info.head_dim),
        "rope_dim": str(info.rope_dim),
        "default_top_k": str(info.default_index_top_k),
        "recipe": recipe,
    }
    if info.adapter_rank:
        metadata["adapter_rank"] = str(info.adapter_rank)
    part = path.with_name(path.name + ".part")
    try:
        save_file(stored, part, metadata)
        _check_tensors(EightBitFile(SafetensorsFile(part)), info, base, str(path))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def base_fingerprint(source: Source) -> str:
    """Return 64 hex digits that identify a trained model, however it is stored.

    They are a hash of the sizes in the config and of the norms' weights. No format quantises norms, so an overlay fits
    both the GGUF files and the Hugging Face folder of a model; and training of all weights changes the norms. Norms
    that were never trained are all ones. Then the hash also has the first key projection, as it is stored.
    """
    sizes = _sizes(source)
    digest = hashlib.sha256(json.dumps([sizes[field] for field in _SHAPE_FIELDS]).encode())
    norms = sorted(name for name in source.names() if name.endswith("norm.weight") and "indexer" not in name)
    trained = False
    for name in norms:
        weight = source.read(name, torch.float32)
        trained = trained or not bool((weight == 1).all())
        digest.update(name.encode() + weight.numpy().tobytes())
    if not trained:
        digest.update(source.read("model.layers.0.self_attn.k_proj.weight", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def indexer_shapes(info: IndexerInfo, num_layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that the indexers of `num_layers` layers have."""
    one = {
        "wq.weight": (info.num_heads * info.head_dim, hidden_size),
        "wk.weight": (info.head_dim, hidden_size),
        "k_norm.weight": (info.head_dim,),
        "k_norm.bias": (info.head_dim,),
        "weights_proj.weight": (info.num_heads, hidden_size),
    }
    return {
        f"model.layers.{i}.self_attn.indexer.{name}": shape
        for i in range(num_layers)
        for name, shape in one.items()
    }


def adapter_shapes(
    rank: int, num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> dict[str, tuple[int, int]]:
    """Return name -> shape of every tensor that the sparse adapters of `num_layers` layers have; empty if rank is 0."""
    one = {
        "qkv.a": (rank, hidden_size),
        "qkv.b": ((num_heads + 2 * num_kv_heads) * head_dim, rank),
        "o.a": (rank, num_heads * head_dim),
        "o.b": (hidden_size, rank),
    }
    return {
        f"model.layers.{i}.self_attn.sparse_adapter.{name}": shape
        for i in range(num_layers if rank else 0)
        for name, shape in one.items()
    }


def overlay_shapes(info: IndexerInfo, base: Source) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor that an overlay of `base` must have."""
    of = _sizes(base)
    layers, hidden = of["num_hidden_layers"], of["hidden_size"]
    heads = of["num_attention_heads"], of["num_key_value_heads"], of["head_dim"]
    return indexer_shapes(info, layers, hidden) | adapter_shapes(info.adapter_rank, layers, hidden, *heads)


def _sizes(base: Source) -> dict[str, int]:
    """Return `_SHAPE_FIELDS` of a checkpoint. Fields about heads that its config lacks come from its projections.

    Raises:
        CheckpointError: a size is missing.
    """
    at, sizes = "model.layers.0.self_attn", dict(base.config)
    try:
        heads = sizes["num_attention_heads"]
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = base.shape(f"{at}.q_proj.weight")[0] // heads
        if sizes.get("num_key_value_heads") is None:
            sizes["num_key_value_heads"] = base.shape(f"{at}.k_proj.weight")[0] // sizes["head_dim"]
        return {field: int(sizes[field]) for field in _SHAPE_FIELDS}
    except KeyError as missing:
        raise CheckpointError(f"{base.description} lacks {missing.args[0]!r} in its config") from None


def _integer(meta: Mapping[str, str], key: str, path: Path) -> int:
    value = meta.get(key)
    if value is None:
        raise CheckpointError(f"{path} lacks {key} in its header")
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise CheckpointError(
            f"{path} has {key} {value!r:.60} in its header, which is not a positive integer"
        )
    return int(value)


def _check_info(info: IndexerInfo, where: str) -> None:
    """Check the indexer's numbers, without regard to the base."""
    sizes = {
        "num_heads": info.num_heads,
        "head_dim": info.head_dim,
        "rope_dim": info.rope_dim,
        "default_top_k": info.default_index_top_k,
    }
    for key, value in sizes.items():
        if value < 1:
            raise CheckpointError(f"{where} has {key} {value}, which is not a positive integer")
    if info.rope_dim % 2 or info.rope_dim > info.head_dim:
        raise CheckpointError(
            f"{where} has rope_dim {info.rope_dim}, which must be even and at most head_dim ({info.head_dim})"
        )


def _check_tensors(tensors: Tensors, info: IndexerInfo, base: Source, where: str) -> tuple[str, ...]:
    """Check that the indexers are whole, finite and fit. Return the other tensors, which replace the base's."""
    num_layers, names = _sizes(base)["num_hidden_layers"], tensors.names()
    needed = overlay_shapes(info, base)
    missing = sorted(needed.keys() - names)
    if missing:
        part = "adapter" if "sparse_adapter" in missing[0] else "indexer"
        raise CheckpointError(
            f"{where} lacks tensor {missing[0]}; each of the base's {num_layers} layers needs a whole {part}"
        )
    others = tuple(sorted(names - needed.keys()))
    for name in others:
        if _OWN_NAME.fullmatch(name):
            raise CheckpointError(
                f"{where} has tensor {name}, which is no part of an indexer or adapter of the base's {num_layers} layers"
            )
        if name not in base.names():
            raise CheckpointError(
                f"{where} has tensor {name}, but {base.description} has none that it could replace"
            )
    for name in (*needed, *others):
        expected = needed[name] if name in needed else base.shape(name)
        if tensors.shape(name) != expected:
            raise CheckpointError(
                f"{where} has tensor {name} of shape {list(tensors.shape(name))}, expected {list(expected)}"
            )
    for name in needed:  # small tensors; the loader checks all tensors again when it reads them
        if not tensors.read(name, torch.float32).isfinite().all():
            raise CheckpointError(f"{where} has NaN or infinite values in tensor {name}; train it again")
    return others
