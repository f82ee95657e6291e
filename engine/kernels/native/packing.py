"""Lays weights out for the native kernels: tiles of 16 outputs, groups of 32 inputs.

`integers.h` describes the tiles of weights in 4 to 8 bits. Scales come before their numbers, so a tile is read from front
to back. A tile of bfloat16 has only numbers. Its words have 64 bytes: a 32-bit lane for each output, with a pair of
inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.memory.quantised import GROUP
from engine.memory.superblocks import SUPER, Superblocks

LANES = 16

Bytes = npt.NDArray[np.uint8]


def pack_4bit(numbers: Bytes, scales: npt.NDArray[np.float16], offsets: npt.NDArray[np.float16]) -> Bytes:
    """Lay out a weight whose values are scale * number + offset.

    Args:
        numbers: [out, in] 0 to 15
        scales: [out, in / 32]
        offsets: [out, in / 32]

    Returns:
        [tiles, bytes of one]
    """
    return _tiles([_lanes(scales), _lanes(offsets)], _nibbles(_tiled(numbers, GROUP)))


def pack_8bit(numbers: npt.NDArray[np.int8], scales: npt.NDArray[np.float16]) -> Bytes:
    """Lay out a weight whose values are scale * number.

    Args:
        numbers: [out, in]
        scales: [out, in / 32]

    Returns:
        [tiles, bytes of one]
    """
    shifted = np.bitwise_xor(numbers.view(np.uint8), np.uint8(128))
    words = _quads(_tiled(shifted, GROUP))
    return _tiles([_lanes(scales)], words.reshape(*words.shape[:2], -1))


def pack_bfloat16(numbers: npt.NDArray[np.uint16]) -> Bytes:
    """Lay out a bfloat16 weight, given as the bits of its [out, in] numbers: [tiles, bytes of one]."""
    tiled = _tiled(numbers, GROUP)
    tiles, _, groups, _ = tiled.shape
    pairs = tiled.reshape(tiles, LANES, groups, GROUP // 2, 2).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(pairs).view(np.uint8).reshape(tiles, -1)


def pack_superblocks(stored: Superblocks) -> Bytes:
    """Lay out a weight in super-blocks: [tiles, bytes of one]. The kernels' own packing is faster, and equal."""
    parts = stored.unpack()
    heads = [_lanes(parts.scales)]
    heads.append(np.zeros_like(heads[0]) if parts.offsets is None else _lanes(parts.offsets))
    tiles, blocks = heads[0].shape[:2]
    small = [_small(parts.small_scales, blocks)]
    if parts.small_offsets is not None:
        small.append(_small(parts.small_offsets, blocks))
    # With offsets the scales of a group of 32 come before its offsets; without them those of its halves follow each
    # other anyway.
    both = np.stack(small, axis=3).reshape(tiles, blocks, -1)
    tiled: Bytes = _tiled(parts.numbers, SUPER)  # [tiles, 16, blocks, 256]
    quads = tiled.reshape(tiles, LANES, blocks, 8, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    quads = quads.reshape(tiles, blocks, 8, 8, 4 * LANES)  # tile, block, group, four inputs, bytes
    low = np.bitwise_and(quads, np.uint8(15))
    groups = [np.bitwise_or(low[..., 0::2, :], np.left_shift(low[..., 1::2, :], np.uint8(4)))]
    high = np.right_shift(quads, np.uint8(4))
    if stored.kind == "q5_k":
        groups.append(_or_shifted(high[:, :, :, None], 1))
    elif stored.kind == "q6_k":
        groups.append(_or_shifted(high.reshape(tiles, blocks, 8, 2, 4, -1), 2))
    numbers = np.concatenate(groups, axis=3).reshape(tiles, blocks, -1)
    return np.concatenate([*heads, both, numbers], axis=-1).reshape(tiles, -1)


def _small(numbers: npt.NDArray[Any], blocks: int) -> Bytes:
    """Lay out small scales as bytes: [out, n] -> [tiles, blocks, n / blocks, 16]."""
    tiled = _tiled(numbers.view(np.uint8), 1)[..., 0]
    tiles = len(tiled)
    return np.ascontiguousarray(tiled.transpose(0, 2, 1)).reshape(tiles, blocks, -1, LANES)


def _or_shifted(bits: Bytes, width: int) -> Bytes:
    """Join words, each shifted by its place times `width`: [..., n words, bytes] -> [..., bytes]."""
    places = np.arange(0, width * bits.shape[-2], width, dtype=np.uint8)
    joined: Bytes = np.bitwise_or.reduce(np.left_shift(bits, places[:, None]), axis=-2)
    return joined


def _tiles(scales: list[Bytes], numbers: Bytes) -> Bytes:
    """Join parts [tiles, groups, bytes], one after the other in each tile."""
    head = np.concatenate([part.reshape(len(part), -1) for part in scales], axis=-1)
    gap = np.zeros((len(head), -head.shape[1] % 64), np.uint8)
    return np.concatenate([head, gap, numbers.reshape(len(numbers), -1)], axis=-1)


def _tiled(numbers: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Cut a matrix into tiles: [out, in] -> [tiles, 16, in / width, width]. Missing outputs are zeros."""
    outputs, inputs = numbers.shape
    missing = -outputs % LANES
    if missing:
        numbers = np.concatenate([numbers, np.zeros((missing, inputs), numbers.dtype)])
    return numbers.reshape(-1, LANES, inputs // width, width)


def _quads(tiled: Bytes) -> Bytes:
    """Lay out bytes in words of four inputs: [tiles, 16, groups, 32] -> [tiles, groups, 8, 64]."""
    tiles, _, groups, _ = tiled.shape
    quads = tiled.reshape(tiles, LANES, groups, 8, 4).transpose(0, 2, 3, 1, 4)
    return np.ascontiguousarray(quads).reshape(tiles, groups, 8, 4 * LANES)


def _nibbles(tiled: Bytes) -> Bytes:
    """Pack numbers from 0 to 15 as nibbles, two words in one: [tiles, 16, groups, 32] -> [tiles, groups, 256]."""
    quads = _quads(tiled)
    both = np.bitwise_or(quads[..., 0::2, :], np.left_shift(quads[..., 1::2, :], np.uint8(4)))
    return both.reshape(*both.shape[:2], -1)


def _lanes(numbers: npt.NDArray[np.float16]) -> Bytes:
    """Lay out scales or offsets as bytes: [out, groups] float16 -> [tiles, groups, 32]."""
    tiled = _tiled(numbers, 1)[..., 0]  # [tiles, 16, groups]
    return np.ascontiguousarray(tiled.transpose(0, 2, 1)).view(np.uint8)
