"""A weight in the layout of the native kernels: packed in 4 or 8 bits, or bfloat16. `packing` does the layout.

The values are exactly those of the checkpoint, or those that `engine.memory.quantised` made. Products take bfloat16
activations, multiply without rounding, and sum in float32 (`engine/kernels/native/matrix.c`).
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import EngineError
from engine.kernels import native
from engine.kernels.native import packing
from engine.memory.quantised import GROUP, Kind, Quantised

_CODES: dict[Kind, int] = {"bf16": 0, "q4": 1, "q8": 2}
_AT_ONCE = 1024  # outputs that are packed at once; whole tiles
_GROUP_BYTES: dict[Kind, int] = {"bf16": 1024, "q4": 320, "q8": 544}  # bytes of 16 outputs x 32 inputs


class Descriptor(ctypes.Structure):
    """`struct dsa_matrix` of matrix.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("kind", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
    )


@dataclass(frozen=True)
class PackedWeight:
    """[out, in] numbers; `in` is a multiple of 32."""

    data: Tensor  # [tiles, bytes] uint8 on the CPU
    kind: Kind
    outputs: int
    inputs: int

    @classmethod
    def of(cls, stored: Quantised | Tensor, memory: Tensor | None = None) -> PackedWeight:
        """Lay out a matrix [out, in]: a quantised one as it is, or a plain one rounded to bfloat16.

        Args:
            stored: the matrix
            memory: [`packed_bytes`] uint8 for the result, beginning on a cache line; None: allocate it
        """
        kind, shape = _form(stored)
        # Memory that torch allocates begins on a cache line.
        flat = torch.empty(cls.bytes_of(stored), dtype=torch.uint8) if memory is None else memory
        data = flat.view(-(-shape[0] // packing.LANES), -1)
        # Pack part by part, because packing needs several times the memory of the part.
        for first in range(0, shape[0], _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            at = first // packing.LANES
            packed = _packed_rows(stored, part)
            data[at : at + len(packed)] = torch.from_numpy(packed)
        return cls(data, kind, *shape)

    @staticmethod
    def bytes_of(stored: Quantised | Tensor) -> int:
        """How many bytes `of` needs in `memory`."""
        kind, shape = _form(stored)
        return packed_bytes(kind, *shape)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight: [out, in]."""
        return torch.Size((self.outputs, self.inputs))

    @property
    def num_bytes(self) -> int:
        """Bytes in memory, scales and padding included."""
        return self.data.nbytes

    def numel(self) -> int:
        """How many numbers the weight has, without scales and padding."""
        return self.outputs * self.inputs

    @cached_property
    def descriptor(self) -> Descriptor:
        """Return the descriptor for the C code. It is valid as long as this weight exists."""
        return Descriptor(self.data.data_ptr(), _CODES[self.kind], self.outputs, self.inputs)

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
        sums = torch.empty(len(rows), self.inputs // GROUP)
        out = torch.empty(len(rows), self.outputs, dtype=dtype)
        narrow, wide = (_pointer(out), None) if dtype is torch.bfloat16 else (None, _pointer(out))
        _library().dsa_linear(
            ctypes.byref(self.descriptor), _pointer(rows), len(rows), _pointer(sums), narrow, wide
        )
        return out.view(*x.shape[:-1], self.outputs)


def _form(stored: Quantised | Tensor) -> tuple[Kind, torch.Size]:
    if isinstance(stored, Tensor):
        return "bf16", stored.shape
    return stored.kind, torch.Size(stored.numbers.shape)


def packed_bytes(kind: Kind, outputs: int, inputs: int) -> int:
    """How many bytes a packed matrix takes (`PackedWeight.num_bytes`)."""
    tile = inputs // GROUP * _GROUP_BYTES[kind]
    return math.ceil(outputs / packing.LANES) * math.ceil(tile / 64) * 64


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
