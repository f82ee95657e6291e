"""Weights in super-blocks: GGUF's Q4_K, Q5_K and Q6_K. 256 neighbours in a row share a float16, groups of them small scales.

`engine.kernels.native.packed` lays such numbers out for the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory.quantised import Kind

SUPER = 256
"""So many neighbours in a row share the scales of their scales."""


@dataclass(frozen=True)
class Superblocks:
    """A matrix as a checkpoint stores it: value = scale * small scale * number - offset * small offset.

    Q6_K has no offsets. Its value is scale * small scale * (number - 32), and 16 neighbours share a small scale.
    """

    kind: Kind  # q4_k, q5_k or q6_k
    numbers: npt.NDArray[np.uint8]  # [out, in], below 16, 32 or 64
    scales: npt.NDArray[np.float16]  # [out, in / 256]
    small_scales: npt.NDArray[Any]  # [out, in / 32] uint8; q6_k: [out, in / 16] int8
    offsets: npt.NDArray[np.float16] | None  # [out, in / 256]; q6_k: None
    small_offsets: npt.NDArray[np.uint8] | None  # [out, in / 32]; q6_k: None

    def arrays(self) -> tuple[npt.NDArray[Any] | None, ...]:
        """Return all arrays; each has a row for each row of the matrix."""
        return self.numbers, self.scales, self.small_scales, self.offsets, self.small_offsets

    def with_arrays(self, arrays: Iterable[npt.NDArray[Any] | None]) -> Superblocks:
        """Return such a matrix with other `arrays`, in their order."""
        numbers, scales, small_scales, offsets, small_offsets = arrays
        assert numbers is not None
        assert scales is not None
        assert small_scales is not None
        return Superblocks(self.kind, numbers, scales, small_scales, offsets, small_offsets)


def read_superblocks(kind: Kind, rows: npt.NDArray[np.uint8]) -> Superblocks:
    """Take apart the blocks of a GGUF tensor; the layouts are those of ggml-common.h.

    Args:
        kind: q4_k, q5_k or q6_k
        rows: [out, bytes of a row]
    """
    out = len(rows)
    if kind == "q6_k":
        blocks = rows.reshape(out, -1, 210)
        lower = _halves(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64))  # 128 inputs from 64 bytes
        bits = blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 1, 32)
        upper = bits >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
        numbers = lower.reshape(*upper.shape) | upper << np.uint8(4)
        return Superblocks(
            kind,
            numbers.reshape(out, -1),
            _float16(blocks[..., 208:210]),
            np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).reshape(out, -1),
            None,
            None,
        )
    blocks = rows.reshape(out, -1, 144 if kind == "q4_k" else 176)
    small_scales, small_offsets = _six_bits(blocks[..., 4:16])
    body = blocks[..., 16:] if kind == "q4_k" else blocks[..., 48:]
    numbers = _halves(body.reshape(*blocks.shape[:2], 4, 32))  # 64 inputs from 32 bytes
    if kind == "q5_k":
        bits = blocks[..., 16:48].reshape(*blocks.shape[:2], 1, 32)
        fifth = bits >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
        numbers = numbers.reshape(*fifth.shape) | fifth << np.uint8(4)
    return Superblocks(
        kind,
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
