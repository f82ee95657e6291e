"""Rotary position embedding (Su et al., arXiv 2104.09864).

Rotated dims form pairs: half-split (dim i with i + n/2) or interleaved (dim 2i with 2i + 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError

_NEEDED: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Return the rotation speed of each pair in radians a position: theta^(-2i/dim), rescaled as the checkpoint says.

    Args:
        dim: rotated dims of a head, even
        theta: the base
        scaling: Hugging Face's `rope_scaling`: None, or type `default`, `dynamic`, `linear`, `llama3` or `yarn`.
            `dynamic` changes nothing up to the model's own number of positions. The engine does not serve more:
            there the speeds depend on the length of the whole sequence, so each new token would change all cached keys.

    Returns:
        [dim / 2] float32

    Raises:
        CheckpointError: the scaling has another type.
    """
    speeds = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = "default" if scaling is None else str(scaling.get("rope_type", scaling.get("type", "default")))
    if scaling is None or kind in ("default", "dynamic"):
        return speeds
    missing = [key for key in _NEEDED.get(kind, ()) if scaling.get(key) is None]
    if missing:
        raise CheckpointError(f"rope scaling of type {kind} lacks {missing[0]!r}")
    if kind == "linear":
        return speeds / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(speeds, scaling)
    if kind == "yarn":
        return _yarn(speeds, theta, scaling)
    raise CheckpointError(
        f"rope scaling of type {kind!r} is not supported; known are default, dynamic, linear, llama3 and yarn"
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return 0.1 * mscale * ln(factor) + 1, by which YaRN sharpens attention (arXiv 2309.00071, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def magnitude(scaling: Mapping[str, Any] | None) -> float:
    """Return the factor of cos and sin. It is 1, except for YaRN.

    If a checkpoint has both `mscale` and `mscale_all_dim`, most of the sharpening is in the softmax scale
    (`softmax_correction`).
    """
    if scaling is None or scaling.get("rope_type") != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = float(scaling["factor"])
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, float(mscale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor, 1.0)


def softmax_correction(scaling: Mapping[str, Any] | None) -> float:
    """Return the factor of a DeepSeek model's softmax scale: yarn_mscale(factor, mscale_all_dim)^2."""
    if scaling is None or scaling.get("rope_type") != "yarn" or not scaling.get("mscale_all_dim"):
        return 1.0
    return yarn_mscale(float(scaling["factor"]), float(scaling["mscale_all_dim"])) ** 2


def _yarn(speeds: Tensor, theta: float, scaling: Mapping[str, Any]) -> Tensor:
    """Apply YaRN (arXiv 2309.00071, section 3.2): pairs that turn often keep their speed, slow pairs are stretched."""
    dim, factor = 2 * len(speeds), float(scaling["factor"])
    length = float(scaling["original_max_position_embeddings"])

    def turning(turns: float) -> float:
        """Return the pair that makes `turns` turns over the original context."""
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = turning(float(scaling.get("beta_fast") or 32)), turning(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(len(speeds), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return speeds / factor * stretched + speeds * (1 - stretched)


def _llama3(speeds: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Apply Llama 3.1's rule: slow pairs are stretched by `factor`, fast pairs keep their speed, others are between."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * speeds / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return speeds * kept + speeds / factor * (1 - kept)


class RotaryTable:
    """cos and sin of every position, computed once."""

    def __init__(
        self,
        dim: int,
        theta: float,
        max_positions: int,
        *,
        scaling: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
    ) -> None:
        angles = torch.outer(
            torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(dim, theta, scaling)
        )
        self.dim = dim
        factor = magnitude(scaling)
        self._cos = (angles.cos() * factor).to(device)  # [max_positions, dim / 2] float32
        self._sin = (angles.sin() * factor).to(device)

    def all(self) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [max_positions, dim / 2] float32."""
        return self._cos, self._sin

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, dim / 2] float32, for positions [T]."""
        return self._cos[positions], self._sin[positions]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], *, interleaved: bool = False) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` dims of each head of x [T, heads, D]. The other dims stay as they are.

    Interleaved pairs stay interleaved, as DeepSeek's cache layouts hold them.
    """
    cos, sin = (part.unsqueeze(1) for part in rotation)  # [T, 1, n / 2]
    half = cos.shape[-1]
    if interleaved:
        pairs = x[..., : 2 * half].float().reshape(*x.shape[:-1], half, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
        return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), dim=-1)
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
