"""Matrices of a safetensors file in 8 bits: integers from -127 to 127, and a scale for every 32 of a row.

A matrix NAME of shape [R, C] is stored as NAME, int8, and NAME.scale, float16 [R, C / 32]; [R, 1] if 32 does not divide C.
An element is its integer times its scale. That takes half of the bytes of float16, and loses about what bfloat16 loses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.checkpoint.safetensors import SafetensorsFile
from engine.errors import CheckpointError

GROUP = 32
SCALE_SUFFIX = ".scale"
_STORED = "I8"
_MOST = 127


def shorten(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they are stored: matrices in 8 bits with their scales, others as they are."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            made[name] = tensor
            continue
        grouped = _grouped(tensor.float())
        scales = (grouped.abs().amax(-1) / _MOST).half()
        # A scale that is too small for float16 is 0, and so are its elements.
        steps = grouped / scales.float().unsqueeze(-1).clamp_min(torch.finfo(torch.float32).tiny)
        made[name] = steps.round().clamp(-_MOST, _MOST).to(torch.int8).reshape(tensor.shape)
        made[name + SCALE_SUFFIX] = scales
    return made


def _grouped(matrix: Tensor) -> Tensor:
    """[R, C] -> [R, groups, elements of a group], a view."""
    rows, columns = matrix.shape
    return matrix.view(rows, -1, GROUP if columns % GROUP == 0 else columns)


class EightBitFile:
    """The tensors of a file, some of them perhaps in 8 bits: `engine.checkpoint.source.Tensors`."""

    def __init__(self, file: SafetensorsFile) -> None:
        self._file = file
        self._scales = frozenset(
            name + SCALE_SUFFIX
            for name in file.names()
            if file.stored(name) == _STORED and name + SCALE_SUFFIX in file.names()
        )

    def names(self) -> frozenset[str]:
        """Every tensor, without scales."""
        return self._file.names() - self._scales

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file.shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor as `dtype`, in memory of its own.

        Raises:
            CheckpointError: there is no such tensor, its scales do not fit, or its numbers are neither floats nor in 8 bits.
        """
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self._scales:
            return self._file.read(name, dtype)
        scales = self._file.read(scale_name, torch.float32)
        matrix = self._file.raw(name).float()
        expected = _grouped(matrix).shape[:2] if matrix.dim() == 2 else None
        if scales.shape != expected:
            raise CheckpointError(
                f"{self._file.path} has scales of shape {list(scales.shape)} for tensor {name} of shape "
                f"{list(matrix.shape)}, which do not fit; the file is damaged, write it again"
            )
        return (_grouped(matrix) * scales.unsqueeze(-1)).view(matrix.shape).to(dtype)
