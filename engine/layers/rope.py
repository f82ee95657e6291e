"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split layout: dim i pairs with i + n/2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError


def inverse_frequencies(dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Tensor:
    """Rotation speed of each pair, radians a position: theta^(-2i/dim), rescaled as the checkpoint says.

    Args:
        dim: rotated dims of a head, even
        theta: the base
        scaling: Hugging Face's `rope_scaling`: None, or type `default`, `linear` or `llama3`

    Returns:
        [dim / 2] float32

    Raises:
        CheckpointError: a scaling of another type.
    """
    speeds = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    kind = "default" if scaling is None else str(scaling.get("rope_type", scaling.get("type", "default")))
    if scaling is None or kind == "default":
        return speeds
    if kind == "linear":
        return speeds / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(speeds, scaling)
    raise CheckpointError(
        f"rope scaling of type {kind!r} is not supported; known are default, linear and llama3"
    )


def _llama3(speeds: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's rule: slow pairs are stretched by `factor`, fast ones kept, those between interpolated."""
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
        self._cos = angles.cos().to(device)  # [max_positions, dim / 2] float32
        self._sin = angles.sin().to(device)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [T, dim / 2] float32, for positions [T]."""
        return self._cos[positions], self._sin[positions]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first `2 * cos.shape[-1]` dims of each head of x [T, heads, D]; the rest passes through."""
    cos, sin = (part.unsqueeze(1) for part in rotation)  # [T, 1, n / 2]
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
