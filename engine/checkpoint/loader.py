"""Loading, walked from the model's side: the model says what it needs, the source is searched for it.

Weights in FP8 blocks become plain, or stay as they are where the model can use them so and the caller asks for it.
A tensor that is missing or of another shape is an error; one that nobody asked for is reported.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from engine.checkpoint.part import Slice
from engine.checkpoint.source import HoldsBlocks, LaidSource, PartSource, Source
from engine.errors import CheckpointError
from engine.memory.blocks import BLOCK, E4M3, E4M3_MAX, BlockWeight, num_blocks

_BENIGN = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn_rot_embd\.weight)")
"""Tensors that checkpoints carry and models compute for themselves."""


@dataclass(frozen=True)
class Weight:
    """A parameter: one tensor of the checkpoint, or several laid one below the other (along dim 0).

    Attributes:
        names: Hugging Face's names, in order
        shape: of the parameter, so of all of them together, whole
        rows: how many rows each name gives; checked if set, else only their sum is
        dtype: what to hold it in whatever the model's dtype is; None is the model's
        may_stay_fp8: whether the model can use it in FP8 blocks
        may_be_packed: whether it can use it as a `PackedWeight`
        may_lose_bits: whether it may then be packed in 4 bits where the main model's weights are
        part: what is read of each name, all of which are of one shape then; None is all
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    may_stay_fp8: bool = False
    may_be_packed: bool = False
    may_lose_bits: bool = False
    part: Slice | None = None

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Of what is read."""
        if self.part is None:
            return self.shape
        size = self.part.stop - self.part.start
        return (len(self.names) * size, *self.shape[1:]) if self.part.dim == 0 else (self.shape[0], size)


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what was not."""

    num_tensors: int  # of the checkpoint
    num_parameters: int
    num_bytes: int  # on the device
    fp8_bytes: int  # of those, in weights that stayed in FP8 blocks, with their scales
    dequantised_bytes: int  # of those, in weights that are stored in FP8 blocks and were made plain
    seconds: float
    unused: tuple[str, ...]  # tensors of the checkpoint that the model did not ask for
    replaced: tuple[str, ...]  # tensors of the base checkpoint that an overlay replaced

    def __str__(self) -> str:
        """What became of weights stored in FP8, for people."""
        parts = (
            f"{self.fp8_bytes:,} stay in FP8 blocks, {self.dequantised_bytes:,} were dequantised from them"
        )
        return f"weights: {self.num_bytes:,} bytes, of which {parts}"


@overload
def load(
    model_table: Mapping[str, Weight],
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = ...,
    fp8: Literal[False] = False,
) -> tuple[dict[str, Tensor], LoadReport]: ...


@overload
def load(
    model_table: Mapping[str, Weight],
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = ...,
    fp8: bool,
) -> tuple[dict[str, Tensor | BlockWeight], LoadReport]: ...


def load(
    model_table: Mapping[str, Weight],
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
    fp8: bool = False,
) -> tuple[dict[str, Tensor], LoadReport] | tuple[dict[str, Tensor | BlockWeight], LoadReport]:
    """Read everything in the table.

    All names and shapes are checked before the first tensor is read.

    Args:
        model_table: parameter name -> what it is made of
        source: where to look
        dtype: of the parameters, where the table has no other
        device: where they go
        progress: called with (bytes loaded, bytes in all), the first time with 0
        fp8: keep weights in FP8 blocks where they are stored so and `stays_fp8`

    Returns:
        the parameters under the table's names, and the report

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds NaN or infinite values.
    """
    started = time.monotonic()
    check(model_table, source)
    in_blocks = source_in_blocks(source)
    kept = {name for name, weight in model_table.items() if fp8 and stays_fp8(weight, in_blocks)}
    sizes = {name: num_bytes(weight, dtype, fp8=name in kept) for name, weight in model_table.items()}
    done, total = 0, sum(sizes.values())
    progress(done, total)
    loaded: dict[str, Tensor | BlockWeight] = {}
    for parameter, weight in model_table.items():
        if parameter in kept and isinstance(source, HoldsBlocks):
            loaded[parameter] = _assemble_blocks(weight, device, source, source.description)
        else:
            loaded[parameter] = _assemble(weight, weight.dtype or dtype, device, source)
        done += sizes[parameter]
        progress(done, total)
    return loaded, LoadReport(
        num_tensors=len({name for weight in model_table.values() for name in weight.names}),
        num_parameters=sum(tensor.numel() for tensor in loaded.values()),
        num_bytes=total,
        fp8_bytes=sum(sizes[name] for name in kept),
        dequantised_bytes=sum(
            sizes[parameter]
            for parameter, weight in model_table.items()
            if parameter not in kept and any(in_blocks(name) for name in weight.names)
        ),
        seconds=time.monotonic() - started,
        unused=unused(model_table, source),
        replaced=source.replaced if isinstance(source, LaidSource) else (),
    )


def stays_fp8(weight: Weight, in_blocks: Callable[[str], bool]) -> bool:
    """Whether a parameter can stay in FP8: all its tensors are stored so, and no block is cut or lies in two of them."""
    whole = len(weight.names) == 1 or (weight.rows is not None and not any(n % BLOCK for n in weight.rows))
    if weight.part is not None:
        whole = whole and weight.part.start % BLOCK == weight.part.stop % BLOCK == 0
    return weight.may_stay_fp8 and whole and all(in_blocks(name) for name in weight.names)


def source_in_blocks(source: Source) -> Callable[[str], bool]:
    """Of a tensor's name: whether the source stores it in FP8 blocks."""
    return source.in_blocks if isinstance(source, HoldsBlocks) else lambda name: False


def num_bytes(weight: Weight, dtype: torch.dtype, *, fp8: bool) -> int:
    """On the device, of a parameter that stays in FP8 blocks, or of one in its own dtype or `dtype`."""
    shape = weight.held_shape
    numel = math.prod(shape)
    if fp8:
        return numel + 4 * num_blocks(shape[0]) * num_blocks(shape[1])
    return numel * (weight.dtype or dtype).itemsize


def check(model_table: Mapping[str, Weight], source: Source) -> None:
    """Whether all of the table is there, in its shapes; reads headers only.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    _check_names(model_table, source)
    for parameter, weight in model_table.items():
        _check_shape(parameter, weight, source)


def unused(model_table: Mapping[str, Weight], source: Source) -> tuple[str, ...]:
    """The tensors that the table does not ask for, in order, less those that models compute for themselves."""
    used = {name for weight in model_table.values() for name in weight.names}
    return tuple(sorted(name for name in source.names() - used if not _BENIGN.fullmatch(name)))


def _check_names(table: Mapping[str, Weight], source: Source) -> None:
    """Everything that the model needs is there."""
    missing = sorted({name for weight in table.values() for name in weight.names} - source.names())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{source.description} lacks tensor {missing[0]}{more}, which the model needs")


def _check_shape(parameter: str, weight: Weight, source: Source) -> None:
    """A weight's tensors together have its shape."""
    shapes = [source.shape(name) for name in weight.names]
    rows = tuple(shape[0] if shape else 0 for shape in shapes)
    fits = all(len(shape) == len(weight.shape) and shape[1:] == weight.shape[1:] for shape in shapes)
    if not fits or sum(rows) != weight.shape[0] or (weight.rows is not None and rows != weight.rows):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in zip(weight.names, shapes, strict=True))
        split = f" split into {list(weight.rows)} rows" if weight.rows is not None else ""
        together = " together" if len(weight.names) > 1 else ""
        raise CheckpointError(
            f"{source.description} has {found}, but the model's {parameter} needs{together} "
            f"shape {list(weight.shape)}{split}"
        )


def _assemble(weight: Weight, dtype: torch.dtype, device: torch.device, source: Source) -> Tensor:
    """A parameter; one of several tensors is filled part by part, so that it never exists twice."""
    if len(weight.names) == 1:
        return _read(weight.names[0], weight.part, dtype, device, source)
    whole = torch.empty(weight.held_shape, dtype=dtype, device=device)
    row = 0
    for name in weight.names:
        part = _read(name, weight.part, dtype, device, source)
        whole[row : row + part.shape[0]] = part
        row += part.shape[0]
    return whole


def _read(name: str, part: Slice | None, dtype: torch.dtype, device: torch.device, source: Source) -> Tensor:
    if part is None:
        tensor = source.read(name, dtype).to(device)
    elif isinstance(source, PartSource):
        tensor = source.read_part(name, part, dtype).to(device)
    else:
        raise CheckpointError(
            f"{source.description} cannot be read in parts; split a folder of safetensors over devices instead"
        )
    # The extremes carry every NaN and infinity, at one pass and no copy.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{source.description} has NaN or infinite values in tensor {name} (as {dtype}); "
            "the file is damaged, download it again"
        )
    return tensor


def _assemble_blocks(weight: Weight, device: torch.device, source: HoldsBlocks, where: str) -> BlockWeight:
    """As `_assemble`, of parts that are whole blocks."""
    rows, columns = weight.held_shape
    values = torch.empty(weight.held_shape, dtype=E4M3, device=device)
    scales = torch.empty(num_blocks(rows), num_blocks(columns), dtype=torch.float32, device=device)
    row = 0
    for name in weight.names:
        part = source.read_blocks(name, weight.part)
        at = slice(row // BLOCK, row // BLOCK + part.scales.shape[0])
        values[row : row + part.shape[0]] = part.values
        scales[at] = part.scales
        # NaN is the one number of this kind that is not finite; of products, the largest decides.
        numbers = values[row : row + part.shape[0]].view(torch.uint8)
        if ((numbers & 0x7F) == 0x7F).any() or not (scales[at] * E4M3_MAX).isfinite().all():
            raise CheckpointError(
                f"{where} has NaN or infinite values in tensor {name} (FP8 with scales); "
                "the file is damaged, download it again"
            )
        row += part.shape[0]
    return BlockWeight(values, scales)
