"""A weight in the layout of the native kernels: packed in 4 to 8 bits, or bfloat16. `packing` does the layout.

The values are exactly those of the checkpoint, or those that `engine.memory.quantised` made. With weights of bfloat16,
products take bfloat16 activations, multiply without rounding, and sum in float32. With weights of 4 to 8 bits, activations
are rounded to 16 bits, too: 32 neighbours are scaled by their largest absolute value (`engine/kernels/native/integers.c`).
Products of many rows use AMX where the processor has it, with two bfloat16 for each number (`engine/kernels/native/amx.h`).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import native
from engine.kernels.native import packing
from engine.memory.quantised import GROUP, Kind, Quantised
from engine.memory.superblocks import SUPER, Superblocks

_CODES: dict[Kind, int] = {"bf16": 0, "q4": 1, "q8": 2, "q4_k": 3, "q5_k": 4, "q6_k": 5}
_AT_ONCE = 1024  # outputs that are packed at once; whole tiles
_GROUP_BYTES: dict[Kind, int] = {"bf16": 1024, "q4": 320, "q8": 544}  # bytes of 16 outputs x 32 inputs
_SUPER_BYTES: dict[Kind, int] = {"q4_k": 2368, "q5_k": 2880, "q6_k": 3392}  # bytes of 16 outputs x 256 inputs

Stored: TypeAlias = Quantised | Superblocks | Tensor
"""A matrix to pack: as a checkpoint stores it, or plain."""


class Descriptor(ctypes.Structure):
    """`struct dsa_matrix` of matrix.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("alike", ctypes.c_int32),
        ("next", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class PackedWeight:
    """[out, in] numbers; `in` is a multiple of 32. A weight whose outputs have several kinds is a chain of parts."""

    data: Tensor  # [tiles, bytes] uint8 on the CPU
    kind: Kind
    own: int  # outputs of this part
    inputs: int
    rest: PackedWeight | None = None  # the part with the outputs after these
    alike: bool = False  # whether a product gives a row the same bits beside any number of other rows

    @classmethod
    def of(cls, stored: Stored | Sequence[Stored], memory: Tensor | None = None) -> PackedWeight:
        """Lay out a matrix [out, in]: a quantised one as it is, or a plain one rounded to bfloat16.

        Args:
            stored: the matrix, or parts of it that are joined along `out`; `can_chain` says which ones can be
            memory: [`bytes_of`] uint8 for the result, beginning on a cache line; None: allocate it
        """
        parts = stored if isinstance(stored, Sequence) else (stored,)
        # Memory that torch allocates begins on a cache line.
        flat = torch.empty(cls.bytes_of(stored), dtype=torch.uint8) if memory is None else memory
        sizes = [cls.bytes_of(part) for part in parts]
        chain: PackedWeight | None = None
        end = len(flat)
        for part, size in zip(reversed(parts), reversed(sizes), strict=True):
            chain = cls._part(part, flat[end - size : end], chain)
            end -= size
        assert chain is not None
        return chain

    @classmethod
    def _part(cls, stored: Stored, flat: Tensor, rest: PackedWeight | None) -> PackedWeight:
        kind, shape = _form(stored)
        data = flat.view(-(-shape[0] // packing.LANES), -1)
        if isinstance(stored, Superblocks):
            blocks = np.ascontiguousarray(stored.blocks)
            _library().dsa_super_pack(
                _CODES[kind], ctypes.c_void_p(blocks.ctypes.data), ctypes.c_int64(blocks.shape[1]),
                shape[0], shape[1], _pointer(data),
            )  # fmt: skip
            return cls(data, kind, shape[0], shape[1], rest)
        # Pack rows by rows, because packing needs several times their memory.
        for first in range(0, shape[0], _AT_ONCE):
            rows = slice(first, first + _AT_ONCE)
            at = first // packing.LANES
            packed = _packed_rows(stored, rows)
            data[at : at + len(packed)] = torch.from_numpy(packed)
        return cls(data, kind, shape[0], shape[1], rest)

    @staticmethod
    def bytes_of(stored: Stored | Sequence[Stored]) -> int:
        """How many bytes `of` needs in `memory`."""
        parts = stored if isinstance(stored, Sequence) else (stored,)
        return sum(packed_bytes(kind, *shape) for kind, shape in map(_form, parts))

    @property
    def outputs(self) -> int:
        """Outputs of all parts."""
        return self.own + (0 if self.rest is None else self.rest.outputs)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight: [out, in]."""
        return torch.Size((self.outputs, self.inputs))

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, scales and padding included."""
        return self.data.nbytes + (0 if self.rest is None else self.rest.num_bytes)

    @property
    def needs_integers(self) -> bool:
        """Whether a part has 4 to 8 bits, so that activations are rounded to 16 bits."""
        return self.kind != "bf16" or (self.rest is not None and self.rest.needs_integers)

    def for_alike_rows(self) -> PackedWeight:
        """The same weight, whose products give a row the same bits beside any number of other rows."""
        rest = None if self.rest is None else self.rest.for_alike_rows()
        return replace(self, rest=rest, alike=True)

    def numel(self) -> int:
        """How many numbers the weight has, without scales and padding."""
        return self.outputs * self.inputs

    @cached_property
    def descriptor(self) -> Descriptor:
        """Return the descriptor for the C code. It is valid as long as this weight exists."""
        after = None if self.rest is None else ctypes.addressof(self.rest.descriptor)
        return Descriptor(self.data.data_ptr(), _CODES[self.kind], self.own, self.inputs, self.alike, after)

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weights of some outputs: [n] int64 -> [n, in] float32, exact."""
        wanted = outputs.contiguous()
        out = torch.empty(len(wanted), self.inputs)
        _library().dsa_rows_of(ctypes.byref(self.descriptor), _pointer(wanted), len(wanted), _pointer(out))
        return out

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Return the plain weight [out, in], rounded once, to `dtype`."""
        return self.rows(torch.arange(self.outputs)).to(dtype)

    def multiply(self, x: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Compute x weight^T: [..., in] bfloat16 -> [..., out] in `dtype` (float32 or bfloat16), summed in float32.

        Raises:
            EngineError: `x` is not bfloat16.
        """
        if x.dtype is not torch.bfloat16 or dtype not in (torch.bfloat16, torch.float32):
            raise EngineError(
                f"a packed weight multiplies bfloat16, not {x.dtype}, into it or float32, not {dtype}"
            )
        rows = x.reshape(-1, self.inputs).contiguous()
        library = _library()
        library.dsa_linear_scratch.restype = ctypes.c_int64
        scratch = torch.empty(
            library.dsa_linear_scratch(ctypes.byref(self.descriptor), len(rows)), dtype=torch.uint8
        )
        out = torch.empty(len(rows), self.outputs, dtype=dtype)
        narrow, wide = (_pointer(out), None) if dtype is torch.bfloat16 else (None, _pointer(out))
        library.dsa_linear(
            ctypes.byref(self.descriptor), _pointer(rows), len(rows), _pointer(scratch), narrow, wide
        )
        return out.view(*x.shape[:-1], self.outputs)


def _form(stored: Stored) -> tuple[Kind, torch.Size]:
    if isinstance(stored, Tensor):
        return "bf16", stored.shape
    return stored.kind, torch.Size(stored.shape)


def packed_bytes(kind: Kind, outputs: int, inputs: int) -> int:
    """How many bytes a packed matrix of one kind takes (`PackedWeight.num_bytes`)."""
    if kind in _SUPER_BYTES:
        tile = inputs // SUPER * _SUPER_BYTES[kind]
    else:
        tile = math.ceil(inputs // GROUP * _GROUP_BYTES[kind] / 64) * 64
    return math.ceil(outputs / packing.LANES) * tile


def can_chain(outputs: Sequence[int]) -> bool:
    """Whether parts with so many outputs, in order, can be one weight: all but the last must be whole tiles."""
    return not any(count % packing.LANES for count in outputs[:-1])


def _packed_rows(stored: Quantised | Tensor, part: slice) -> npt.NDArray[np.uint8]:
    if isinstance(stored, Tensor):
        return packing.pack_bfloat16(stored[part].bfloat16().contiguous().view(torch.uint16).numpy())
    numbers, scales = stored.numbers[part], stored.scales[part]
    if stored.offsets is None:
        return packing.pack_8bit(numbers.astype(np.int8, copy=False), scales)
    return packing.pack_4bit(numbers.astype(np.uint8, copy=False), scales, stored.offsets[part])


def _library() -> ctypes.CDLL:
    found = native.library()
    if found is None:
        raise EngineError(f"a packed weight needs the native kernels, but {native.missing()}")
    return found


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
