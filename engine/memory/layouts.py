"""How FP8 latents and index keys lie in their pages: byte for byte as FlashMLA and DeepGEMM read them.

Both are planes of bytes [num_pages, 64, bytes a token] with the page table of all planes. A latent and its rotary key
are interleaved by token (FlashMLA's V32_FP8Sparse, 656 bytes a token). The index keys of a page come first and their
scales after them (DeepGEMM's paged layout, 132 bytes a token), so the 132 bytes of a token are not consecutive. Index
keys in 8-bit integers, for the CPU, lie as its integer products read them. The kernels compute numbers and scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import EngineError
from engine.memory.blocks import BLOCK, E4M3, dequantise_rows, num_blocks
from engine.memory.planes import PlaneSpec


@dataclass(frozen=True)
class LatentLayout:
    """A token is [rank numbers e4m3][one float32 scale for each 128 of them][rope numbers bfloat16]."""

    rank: int  # kv_lora_rank, 512
    rope: int  # qk_rope_head_dim, 64

    @property
    def token_bytes(self) -> int:
        """Bytes a token: 656 if rank is 512 and rope 64."""
        return self.rank + 4 * num_blocks(self.rank) + 2 * self.rope

    def spec(self, name: str) -> PlaneSpec:
        """The plane that holds them."""
        return PlaneSpec(name, (self.token_bytes,), torch.uint8)

    def pack(self, values: Tensor, scales: Tensor, rope: Tensor) -> Tensor:
        """Make the bytes of T tokens.

        Args:
            values: [T, rank] float8_e4m3fn
            scales: [T, ceil(rank / 128)] float32
            rope: [T, rope], rounded to bfloat16 here

        Returns:
            [T, token_bytes] uint8
        """
        parts = (values, scales, rope.to(torch.bfloat16))
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Undo `pack`: [..., token_bytes] uint8 -> [..., rank + rope] in `dtype`, the latent first."""
        scales_at = self.rank
        rope_at = scales_at + 4 * num_blocks(self.rank)
        values = packed[..., :scales_at].view(E4M3)
        # A view as another dtype needs aligned memory, which the odd sizes of a small model do not give.
        scales = packed[..., scales_at:rope_at].contiguous().view(torch.float32)
        rope = packed[..., rope_at:].contiguous().view(torch.bfloat16)
        return torch.cat((dequantise_rows(values, scales, dtype), rope.to(dtype)), dim=-1)


@dataclass(frozen=True)
class IndexKeyLayout:
    """A page: 64 x dim bytes of e4m3, then 64 float32 scales."""

    dim: int  # index_head_dim, 128; at most one block, which has one scale

    def __post_init__(self) -> None:
        if self.dim > BLOCK:
            raise EngineError(
                f"an index key of {self.dim} numbers cannot have one FP8 scale; at most {BLOCK} can"
            )

    @property
    def token_bytes(self) -> int:
        """Bytes a token: 132 if dim is 128."""
        return self.dim + 4

    def spec(self, name: str) -> PlaneSpec:
        """The plane that holds them."""
        return PlaneSpec(name, (self.token_bytes,), torch.uint8)

    def write(self, plane: Tensor, pages: Tensor, offsets: Tensor, values: Tensor, scales: Tensor) -> None:
        """Store T keys.

        Args:
            plane: [num_pages, S, dim + 4] uint8, as `PagedCache.plane` gives it
            pages: [T] int64
            offsets: [T] int64
            values: [T, dim] float8_e4m3fn
            scales: [T] float32
        """
        keys, key_scales = self._parts(plane)
        keys[pages, offsets] = values.view(torch.uint8)
        key_scales[pages, offsets] = scales

    def read(self, plane: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the keys and scales of whole pages: [...] int64 -> ([..., S, dim] float8_e4m3fn, [..., S] float32)."""
        keys, scales = self._parts(plane)
        return keys[pages].view(E4M3), scales[pages]

    def _parts(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of all pages' keys [num_pages, S, dim] uint8 and scales [num_pages, S] float32."""
        num_pages, size, width = plane.shape
        flat = plane.view(num_pages, size * width)
        keys = flat[:, : size * self.dim].view(num_pages, size, self.dim)
        return keys, flat[:, size * self.dim :].view(torch.float32)


@dataclass(frozen=True)
class Int8KeyLayout:
    """A page: [4 groups of 16 tokens][dim / 4][16 tokens][4 dims] bytes of n + 128, then 64 float32 scales.

    Four dims of sixteen tokens are one operand of VNNI's vpdpbusd. Its first factor is unsigned, so 128 is added to
    each number n.
    """

    dim: int

    def __post_init__(self) -> None:
        if not self.fits(self.dim):
            raise EngineError(
                f"an index key of {self.dim} numbers cannot be kept in 8-bit integers; a multiple of 4 up to 512 can"
            )

    @staticmethod
    def fits(dim: int) -> bool:
        """Whether this layout can hold keys of `dim` numbers."""
        return 0 < dim <= 512 and dim % 4 == 0

    @property
    def token_bytes(self) -> int:
        """Bytes a token: 68 if dim is 64."""
        return self.dim + 4

    def spec(self, name: str) -> PlaneSpec:
        """The plane that holds them."""
        return PlaneSpec(name, (self.token_bytes,), torch.uint8)

    def write(self, plane: Tensor, pages: Tensor, offsets: Tensor, numbers: Tensor, scales: Tensor) -> None:
        """Store T keys.

        Args:
            plane: [num_pages, 64, dim + 4] uint8, as `PagedCache.plane` gives it
            pages: [T] int64
            offsets: [T] int64
            numbers: [T, dim] integers from -127 to 127, of any dtype
            scales: [T] float32
        """
        keys, key_scales = self._parts(plane)
        keys[pages, offsets // 16, :, offsets % 16] = (
            (numbers + 128).to(torch.uint8).view(-1, self.dim // 4, 4)
        )
        key_scales[pages, offsets] = scales

    def read(self, plane: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Copy whole pages as float32: [...] int64 -> (numbers [..., 64, dim], scales [..., 64])."""
        keys, scales = self._parts(plane)
        numbers = keys[pages].transpose(-3, -2)  # [..., 4, 16, dim / 4, 4]
        return numbers.reshape(*pages.shape, 64, self.dim).float() - 128, scales[pages]

    def _parts(self, plane: Tensor) -> tuple[Tensor, Tensor]:
        """Return views of all pages' keys [num_pages, 4, dim / 4, 16, 4] uint8 and scales [num_pages, 64] float32."""
        num_pages, size, width = plane.shape
        flat = plane.view(num_pages, size * width)
        keys = flat[:, : size * self.dim].view(num_pages, size // 16, self.dim // 4, 16, 4)
        return keys, flat[:, size * self.dim :].view(torch.float32)
