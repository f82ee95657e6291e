"""Weights in super-blocks: GGUF's Q4_K, Q5_K and Q6_K. 256 neighbours in a row share a float16, groups of them small scales.

`engine.kernels.native.packed` lays such numbers out for the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory.quantised import Kind

SUPER = 256
"""So many neighbours in a row share the scales of their scales."""


_BLOCK_BYTES: Mapping[Kind, int] = {"q4_k": 144, "q5_k": 176, "q6_k": 210}


@dataclass(frozen=True)
class Superblocks:
    """A matrix [out, in] as a GGUF file stores it; the layouts of blocks are those of ggml-common.h."""

    kind: Kind  # q4_k, q5_k or q6_k
    blocks: npt.NDArray[np.uint8]  # [out, bytes of a row]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        rows, size = self.blocks.shape
        return rows, size // _BLOCK_BYTES[self.kind] * SUPER

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """Return what has a row for each row of the matrix."""
        return (self.blocks,)

    def with_arrays(self, arrays: Iterable[npt.NDArray[Any] | None]) -> Superblocks:
        """Return such a matrix of other `arrays`, in their order."""
        (blocks,) = arrays
        assert blocks is not None
        return Superblocks(self.kind, blocks)

    def are_finite(self) -> bool:
        """Whether no scale is NaN or infinite."""
        blocks = self.blocks.reshape(len(self.blocks), -1, _BLOCK_BYTES[self.kind])
        halves = blocks[..., 208:] if self.kind == "q6_k" else blocks[..., :4]
        return bool(np.isfinite(np.ascontiguousarray(halves).view(np.float16)).all())

    def unpack(self) -> Unpacked:
        """Take the blocks apart."""
        return _unpack(self.kind, self.blocks)


@dataclass(frozen=True)
class Unpacked:
    """The same, number by number: value = scale * small scale * number - offset * small offset.

    Q6_K has no offsets. Its value is scale * small scale * (number - 32), and 16 neighbours share a small scale.
    """

    numbers: npt.NDArray[np.uint8]  # [out, in], below 16, 32 or 64
    scales: npt.NDArray[np.float16]  # [out, in / 256]
    small_scales: npt.NDArray[Any]  # [out, in / 32] uint8; q6_k: [out, in / 16] int8
    offsets: npt.NDArray[np.float16] | None  # [out, in / 256]; q6_k: None
    small_offsets: npt.NDArray[np.uint8] | None  # [out, in / 32]; q6_k: None


def _unpack(kind: Kind, rows: npt.NDArray[np.uint8]) -> Unpacked:
    out = len(rows)
    blocks = rows.reshape(out, -1, _BLOCK_BYTES[kind])
    if kind == "q6_k":
        lower = _halves(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))  # 128 inputs from 64 bytes
        bits = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
        upper = bits >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
        numbers = lower.reshape(*upper.shape) | upper << np.uint8(4)
        return Unpacked(
            numbers.reshape(out, -1),
            _float16(blocks[..., 208:210]),
            np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(out, -1),
            None,
            None,
        )
    small_scales, small_offsets = _six_bits(blocks[..., 4:16])
    body = blocks[..., 16:] if kind == "q4_k" else blocks[..., 48:]
    numbers = _halves(body.reshape(*blocks.shape[:2], 4, 32))  # 64 inputs from 32 bytes
    if kind == "q5_k":
        bits = blocks[..., 16:48].reshape(*blocks.shape[:2], 1, 32)
        fifth = bits >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
        numbers = numbers.reshape(*fifth.shape) | fifth << np.uint8(4)
    return Unpacked(
        numbers.reshape(out, -1),
        _float16(blocks[..., 0:2]),
        small_scales.reshape(out, -1),
        _float16(blocks[..., 2:4]),
        small_offsets.reshape(out, -1),
    )


def _halves(body: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return the lower nibbles of each run of bytes, then the upper ones."""
    return np.concatenate([body & np.uint8(15), body >> np.uint8(4)], axis=-1)


def _float16(two: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    """[out, blocks, 2] bytes -> [out, blocks]."""
    return np.ascontiguousarray(two).view(np.float16)[..., 0]


def _six_bits(packed: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Unpack eight scales and eight offsets of 6 bits: [out, blocks, 12] -> twice [out, blocks, 8].

    The first four bytes have four scales, the next four offsets, in their lower 6 bits. The last four bytes have the
    lower 4 bits of the other four of both, whose upper 2 bits are in the upper bits of the first eight bytes.
    """
    first, second, last = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    six, four, two = np.uint8(6), np.uint8(4), np.uint8(2)
    high = np.uint8(0x30)
    scales = [first & np.uint8(63), last & np.uint8(15) | first >> two & high]
    offsets = [second & np.uint8(63), last >> four | second >> six << four]
    return np.concatenate(scales, axis=-1), np.concatenate(offsets, axis=-1)
