"""Reads a GGUF file: its metadata, the places of its tensors, and their numbers. `gguf.py` knows what they mean.

The `gguf` package has a reader too. But it makes several array objects for each of a tokenizer's hundred thousand
strings, which takes seconds at every start, and a damaged file can keep it busy without end. So this module reads the
header. It skips tokenizers and checks every length. The table of block formats and their dequantisation are the
package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from engine.errors import CheckpointError
from engine.memory.quantised import Kind, Quantised
from engine.memory.superblocks import Superblocks

_SCALARS: Mapping[gguf.GGUFValueType, str] = {
    gguf.GGUFValueType.UINT8: "B",
    gguf.GGUFValueType.INT8: "b",
    gguf.GGUFValueType.UINT16: "H",
    gguf.GGUFValueType.INT16: "h",
    gguf.GGUFValueType.UINT32: "I",
    gguf.GGUFValueType.INT32: "i",
    gguf.GGUFValueType.FLOAT32: "f",
    gguf.GGUFValueType.UINT64: "Q",
    gguf.GGUFValueType.INT64: "q",
    gguf.GGUFValueType.FLOAT64: "d",
    gguf.GGUFValueType.BOOL: "?",
}
_QUANTISED: Mapping[gguf.GGMLQuantizationType, Kind] = {
    gguf.GGMLQuantizationType.Q4_0: "q4",
    gguf.GGMLQuantizationType.Q4_1: "q4",
    gguf.GGMLQuantizationType.Q8_0: "q8",
    gguf.GGMLQuantizationType.Q4_K: "q4_k",
    gguf.GGMLQuantizationType.Q5_K: "q5_k",
    gguf.GGMLQuantizationType.Q6_K: "q6_k",
}
"""The block formats that the native kernels multiply with as they are stored."""
_MAX_DIMS = 4  # GGML's own limit
_SKIPPED = "tokenizer."  # large, and only the server needs it


class TensorPlace(NamedTuple):
    """The place of a tensor in the file."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, as in torch; the file has the reverse order
    offset: int  # bytes from the start of the file
    size: int  # bytes


class GGUFFile:
    """An open, memory-mapped GGUF file (versions 2 and 3, little-endian)."""

    def __init__(self, path: Path) -> None:
        """Map the file and walk its header.

        Raises:
            CheckpointError: it cannot be read, is not a GGUF file, or is damaged or cut off.
        """
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as fault:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{path} cannot be read: {fault}") from None
        cursor = _Cursor(self._data, path)
        if self._data[:4] != b"GGUF":
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        cursor.at = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} has GGUF version {version}; versions 2 and 3 are supported, little-endian"
            )
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: Mapping[str, Any] = _metadata(cursor, num_values)
        places = [_place(cursor) for _ in range(num_tensors)]
        self.tensors: Mapping[str, TensorPlace] = self._checked(places, cursor.at)

    def _checked(self, places: list[tuple[str, TensorPlace]], header_end: int) -> dict[str, TensorPlace]:
        """Make offsets absolute; check that each tensor lies inside the file and that no name occurs twice."""
        align = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if isinstance(align, bool) or not isinstance(align, int) or align < 1 or align & (align - 1):
            raise CheckpointError(f"{self.path} has general.alignment {align!r}, which is not a power of two")
        start = -(-header_end // align) * align
        tensors: dict[str, TensorPlace] = {}
        for name, place in places:
            if name in tensors:
                raise CheckpointError(f"{self.path} is damaged: it names tensor {name} twice")
            end = start + place.offset + place.size
            if end > len(self._data):
                raise CheckpointError(
                    f"{self.path} is truncated: tensor {name} ends at byte {end}, "
                    f"but the file has {len(self._data)}; download it again"
                )
            tensors[name] = place._replace(offset=start + place.offset)
        return tensors

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Read a tensor's numbers, dequantised. They are read-only if they are stored as float32.

        Args:
            name: one of `tensors`

        Raises:
            CheckpointError: the gguf package cannot dequantise the tensor's format.
        """
        place = self.tensors[name]
        try:
            numbers = gguf.dequantize(self._rows(place), place.kind)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path} stores tensor {name} as {place.kind.name}, which cannot be dequantised; "
                "use a file with another quantisation (Q8_0 or Q4_K, for example)"
            ) from None
        return np.asarray(numbers, np.float32).reshape(place.shape)

    def quantised(self, name: str) -> Quantised | Superblocks | None:
        """Read the exact numbers, scales and offsets of a matrix. Return None if its format is not in `_QUANTISED`.

        Args:
            name: one of `tensors`
        """
        place = self.tensors[name]
        if place.kind not in _QUANTISED or len(place.shape) != 2:
            return None
        kind = _QUANTISED[place.kind]
        if kind in ("q4_k", "q5_k", "q6_k"):
            return Superblocks(kind, self._rows(place))
        blocks = self._rows(place).reshape(place.shape[0], -1, gguf.GGML_QUANT_SIZES[place.kind][1])
        head = blocks[..., : 4 if place.kind is gguf.GGMLQuantizationType.Q4_1 else 2].view(np.float16)
        body = blocks[..., head.shape[-1] * 2 :]
        scales = head[..., 0]
        if place.kind is gguf.GGMLQuantizationType.Q8_0:
            return Quantised(body.view(np.int8).reshape(place.shape), scales, None)
        # The first 16 numbers of a block are the lower nibbles, and the last 16 are the upper nibbles.
        numbers = np.concatenate([body & 15, body >> 4], axis=-1).reshape(place.shape)
        # -8 * scale is exact, because 8 is a power of two and scales are far below the largest float16.
        offsets = head[..., 1] if head.shape[-1] == 2 else np.float16(-8) * scales
        return Quantised(numbers, scales, offsets)

    def quantised_kind(self, name: str) -> Kind | None:
        """Return the kind of the matrix that `quantised` returns; None if that returns None."""
        place = self.tensors[name]
        return _QUANTISED.get(place.kind) if len(place.shape) == 2 else None

    def _rows(self, place: TensorPlace) -> npt.NDArray[np.uint8]:
        flat = np.frombuffer(self._data, np.uint8, place.size, place.offset)
        return flat.reshape(*place.shape[:-1], -1)


class _Cursor:
    """A position in the header. Each read moves it forward, and never past the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.at = 0
        self.path = path
        self._data = data

    def scalar(self, code: str) -> Any:
        """Read one little-endian number of `struct`'s format `code`."""
        return self.scalars(code, 1)[0]

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        """Read `count` little-endian numbers of `struct`'s format `code`."""
        size = count * struct.calcsize(f"<{code}")
        self._need(size)  # check first, because a damaged file may have any `count`
        found = struct.unpack_from(f"<{count}{code}", self._data, self.at)
        self.at += size
        return found

    def string(self) -> str:
        """Read a string: its length in bytes, then UTF-8."""
        size = self.scalar("Q")
        self._need(size)
        self.at += size
        return self._data[self.at - size : self.at].decode("utf-8", errors="replace")

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings. This loop takes most of the time of reading a header."""
        length = struct.Struct("<Q").unpack_from
        data, at, last = self._data, self.at, len(self._data) - 8
        for _ in range(count):
            if at > last:
                self._need(len(data))
            at += 8 + length(data, at)[0]
        self.at = at
        self._need(0)

    def skip_scalars(self, code: str, count: int) -> None:
        """Skip `count` numbers."""
        size = count * struct.calcsize(f"<{code}")
        self._need(size)
        self.at += size

    def _need(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise CheckpointError(
                f"{self.path} is truncated or damaged: its header runs past the end of the file "
                f"({len(self._data)} bytes); download it again"
            )


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    """Read the key-value pairs. Arrays under `tokenizer.` are skipped, and their value is None."""
    found: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in found:
            raise CheckpointError(f"{cursor.path} is damaged: it sets {key} twice")
        found[key] = _value(cursor, key, keep=not key.startswith(_SKIPPED))
    return found


def _value(cursor: _Cursor, key: str, *, keep: bool) -> Any:
    kind = _value_type(cursor, key)
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind is gguf.GGUFValueType.STRING:
        return cursor.string()
    kind, count = _value_type(cursor, key), cursor.scalar("Q")
    if kind is gguf.GGUFValueType.ARRAY:
        raise CheckpointError(f"{cursor.path} is damaged: {key} is an array of arrays")
    if kind is gguf.GGUFValueType.STRING:
        if keep:
            return [cursor.string() for _ in range(count)]
        return cursor.skip_strings(count)
    if keep:
        return list(cursor.scalars(_SCALARS[kind], count))
    return cursor.skip_scalars(_SCALARS[kind], count)


def _value_type(cursor: _Cursor, key: str) -> gguf.GGUFValueType:
    code = cursor.scalar("I")
    try:
        return gguf.GGUFValueType(code)
    except ValueError:
        raise CheckpointError(
            f"{cursor.path} is damaged: {key} has value type {code}, which GGUF lacks"
        ) from None


def _place(cursor: _Cursor) -> tuple[str, TensorPlace]:
    """Read one entry of the tensor table. Its offset counts from the start of the data."""
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name} has {num_dims} dimensions")
    shape = tuple(reversed(cursor.scalars("Q", num_dims)))
    if 0 in shape:
        raise CheckpointError(f"{cursor.path} is damaged: tensor {name} has shape {shape}")
    code, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        kind = gguf.GGMLQuantizationType(code)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{cursor.path} stores tensor {name} as type {code}, which this version of the gguf package lacks"
        ) from None
    if shape[-1] % block:
        raise CheckpointError(
            f"{cursor.path} is damaged: rows of tensor {name} have {shape[-1]} numbers, not a multiple of the "
            f"{block} in a block of {kind.name}"
        )
    return name, TensorPlace(kind, shape, offset, math.prod(shape) // block * block_bytes)
