"""The number formats of a DeepSeek layer: of cached latents, of index keys and queries, and of weights.

`auto` follows the checkpoint: a model published in FP8 was trained and is served with an FP8 cache and indexer
(arXiv 2512.02556, section 2); any other keeps the dtype that it is loaded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from engine.attention.indexer import IndexQueries
from engine.config import CacheDtype, IndexerDtype, WeightDtype
from engine.errors import ConfigError
from engine.kernels.interface.attention import Kernels
from engine.kernels.interface.fp8 import CACHE_FLOOR
from engine.kernels.interface.latent import Unpack, as_stored
from engine.memory.blocks import BLOCK
from engine.memory.layouts import IndexKeyLayout, LatentLayout
from engine.memory.planes import PlaneSpec

Numbers = torch.dtype | Literal["fp8"]
"""The numbers of a plane: plain numbers of a dtype, or FP8 with scales that are powers of two."""


@dataclass(frozen=True)
class LatentFormat:
    """How the cache stores a token's latent and its rotated key."""

    layout: LatentLayout
    numbers: Numbers
    model_dtype: torch.dtype

    @property
    def spec(self) -> PlaneSpec:
        """The plane of the latents."""
        if self.numbers == "fp8":
            return self.layout.spec("latent")
        return PlaneSpec("latent", (self.layout.rank + self.layout.rope,), self.numbers)

    def pack(self, cached: Tensor, kernels: Kernels) -> Tensor:
        """Convert latents and rotated keys to the stored form: [T, rank + rope] -> [T, *spec.shape]."""
        if self.numbers == "fp8":
            latent, rope = cached[:, : self.layout.rank], cached[:, self.layout.rank :]
            return self.layout.pack(*kernels.quantise(latent, "ue8m0", CACHE_FLOOR), rope)
        return cached.to(self.numbers)

    @property
    def unpack(self) -> Unpack:
        """Return the function that undoes `pack`, up to rounding."""
        if self.numbers == "fp8":
            return lambda stored: self.layout.unpack(stored, self.model_dtype)
        return as_stored


@dataclass(frozen=True)
class IndexFormat:
    """How index keys are stored and index queries are made. In FP8 both are rotated, with one scale a vector."""

    dim: int
    numbers: Numbers

    @property
    def spec_dtype(self) -> torch.dtype:
        """The dtype of the plane."""
        return torch.uint8 if self.numbers == "fp8" else self.numbers

    def spec(self, layers: frozenset[int]) -> PlaneSpec:
        """The plane of the index keys; `layers` are those that have an indexer."""
        if self.numbers == "fp8":
            return PlaneSpec("index_key", (IndexKeyLayout(self.dim).token_bytes,), torch.uint8, layers=layers)
        return PlaneSpec("index_key", (self.dim,), self.numbers, layers=layers)

    def write(self, plane: Tensor, pages: Tensor, offsets: Tensor, keys: Tensor, kernels: Kernels) -> None:
        """Store keys [T, d] at (pages[t], offsets[t])."""
        if self.numbers == "fp8":
            values, scales = kernels.quantise(kernels.hadamard(keys), "ue8m0")
            IndexKeyLayout(self.dim).write(plane, pages, offsets, values, scales.squeeze(-1))
        else:
            plane[pages, offsets] = keys.to(self.numbers)

    def queries(self, queries: IndexQueries, kernels: Kernels) -> IndexQueries:
        """Convert queries to the numbers of the keys. The scale of an FP8 query goes into its head's weight."""
        if self.numbers != "fp8":
            return queries
        values, scales = kernels.quantise(kernels.hadamard(queries.query), "ue8m0")
        return IndexQueries(query=values, head_weights=queries.head_weights * scales.squeeze(-1))


@dataclass(frozen=True)
class Precision:
    """The number formats that the engine's settings ask for; the methods resolve `auto`."""

    kv_cache: CacheDtype = "auto"
    indexer: IndexerDtype = "auto"
    weights: WeightDtype = "auto"

    def latent(self, config: Mapping[str, Any], rank: int, rope: int, dtype: torch.dtype) -> LatentFormat:
        """The format of latents, for a checkpoint's config and a model loaded in `dtype`."""
        return LatentFormat(LatentLayout(rank, rope), _numbers(self.kv_cache, config, dtype), dtype)

    def index(self, config: Mapping[str, Any], dim: int, dtype: torch.dtype) -> IndexFormat:
        """The format of index keys, for a checkpoint's config and a model loaded in `dtype`.

        Raises:
            ConfigError: index vectors of this size cannot be rotated or need several scales, or the settings ask
                for integers.
        """
        if self.indexer == "int8":
            raise ConfigError("indexer_dtype is int8, which is for llama models; set it to bf16, fp8 or auto")
        chosen = _numbers(self.indexer, config, dtype)
        if chosen == "fp8" and (dim > BLOCK or dim & (dim - 1)):
            raise ConfigError(
                f"index vectors of {dim} numbers cannot be kept in FP8, which takes a power of two up to {BLOCK}; "
                "set indexer_dtype to bf16"
            )
        return IndexFormat(dim, chosen)

    def resident(self, device: torch.device) -> bool:
        """Whether weights that the checkpoint stores in FP8 blocks stay in FP8 in memory."""
        return self.weights == "fp8" or (self.weights == "auto" and device.type == "cuda")


def _numbers(asked: IndexerDtype, config: Mapping[str, Any], dtype: torch.dtype) -> Numbers:
    if asked == "fp8" or (asked == "auto" and config.get("quantization_config")):
        return "fp8"
    return torch.bfloat16 if asked == "bf16" else dtype
