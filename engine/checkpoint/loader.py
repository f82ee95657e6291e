"""Loads the parameters of a model: the model's table says what it needs, and the source has the tensors.

Weights in FP8 blocks become plain, or stay in FP8 if the model can use them so and the caller asks for it. A tensor
that is missing or has another shape is an error. A tensor that the table does not have is reported. `packed` loads
for the native CPU kernels.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor

from engine.checkpoint.part import Slice
from engine.checkpoint.source import HoldsBlocks, LaidSource, PartSource, Source
from engine.checkpoint.stream import InFiles, Stream
from engine.errors import CheckpointError
from engine.memory.blocks import BLOCK, E4M3, E4M3_MAX, BlockWeight, num_blocks

STREAMED: tuple[str, ...] = ("cuda",)
"""The types of devices that files are streamed to. On others a parameter is read when its turn comes."""
_AHEAD = 256 << 20
"""So many bytes are asked for before a parameter is waited for."""
_BENIGN = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn_rot_embd\.weight)")
"""Tensors that checkpoints may have and that models compute themselves."""


@dataclass(frozen=True)
class Weight:
    """A parameter: one tensor of the checkpoint, or several tensors joined along dim 0.

    Attributes:
        names: Hugging Face's names of the tensors, in order
        shape: of the whole parameter, without regard to `part`
        rows: how many rows each tensor has; None: only their sum is checked
        dtype: of the parameter, whatever the model's dtype is; None: the model's dtype
        may_stay_fp8: whether the model can use the parameter in FP8 blocks
        may_be_packed: whether the model can use it as a `PackedWeight`
        may_lose_bits: whether it may be packed in 4 bits if the main model's weights are
        part: which part of each tensor is read; then all tensors have the same shape. None: all
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
        """The shape of the parameter as it is loaded: of the parts that are read."""
        if self.part is None:
            return self.shape
        size = self.part.stop - self.part.start
        return (len(self.names) * size, *self.shape[1:]) if self.part.dim == 0 else (self.shape[0], size)


@dataclass(frozen=True)
class LoadReport:
    """Which tensors were loaded, and which were not."""

    num_tensors: int  # tensors of the checkpoint that were loaded
    num_parameters: int
    num_bytes: int  # on the device
    fp8_bytes: int  # part of `num_bytes`: weights that stayed in FP8 blocks, with their scales
    dequantised_bytes: int  # part of `num_bytes`: weights that are stored in FP8 blocks and were made plain
    seconds: float
    unused: tuple[str, ...]  # tensors of the checkpoint that the model did not ask for
    replaced: tuple[str, ...]  # tensors of the base checkpoint that an overlay replaced

    def __str__(self) -> str:
        """Say in words what happened to weights stored in FP8."""
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
    """Load all parameters of the table.

    All names and shapes are checked before the first tensor is read.

    Args:
        model_table: parameter name -> its tensors
        source: the checkpoint
        dtype: of the parameters, if the table has no other
        device: of the parameters
        progress: called with (bytes loaded, bytes in all), the first time with 0 bytes loaded
        fp8: keep weights in FP8 blocks if `stays_fp8` allows it

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
    for parameter, value in _parameters(model_table, source, dtype, device, kept):
        loaded[parameter] = value
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


def _parameters(
    table: Mapping[str, Weight],
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    kept: Collection[str],
) -> Iterator[tuple[str, Tensor | BlockWeight]]:
    """Read all parameters, those in `kept` in FP8 blocks. From files to a GPU they are read ahead of their turn."""
    if not (device.type in STREAMED and isinstance(source, InFiles)):
        for parameter, weight in table.items():
            yield parameter, _parameter(weight, source, dtype, device, fp8=parameter in kept)
        return
    with Stream(source, device) as stream:
        coming: deque[tuple[str, int, Callable[[], Tensor | BlockWeight]]] = deque()
        ahead = 0
        for parameter, weight in table.items():
            fp8, own = parameter in kept, weight.dtype or dtype
            if stream.takes(weight.names, weight.part):
                end = stream.begin(weight.names, weight.part, weight.held_shape, own, fp8=fp8)
            else:
                end = partial(_parameter, weight, source, dtype, device, fp8=fp8)
            size = num_bytes(weight, dtype, fp8=fp8)
            coming.append((parameter, size, end))
            ahead += size
            while len(coming) > 1 and ahead - coming[0][1] >= _AHEAD:
                name, size, end = coming.popleft()
                ahead -= size
                yield name, end()
        for name, _, end in coming:
            yield name, end()
        stream.check()


def _parameter(
    weight: Weight, source: Source, dtype: torch.dtype, device: torch.device, *, fp8: bool
) -> Tensor | BlockWeight:
    """Read a parameter, in FP8 blocks if `fp8`."""
    if fp8 and isinstance(source, HoldsBlocks):
        return _assemble_blocks(weight, device, source, source.description)
    return _assemble(weight, weight.dtype or dtype, device, source)


def stays_fp8(weight: Weight, in_blocks: Callable[[str], bool]) -> bool:
    """Whether a parameter can stay in FP8: all its tensors are stored in blocks, and no block is cut or spans two."""
    whole = len(weight.names) == 1 or (weight.rows is not None and not any(n % BLOCK for n in weight.rows))
    if weight.part is not None:
        whole = whole and weight.part.start % BLOCK == weight.part.stop % BLOCK == 0
    return weight.may_stay_fp8 and whole and all(in_blocks(name) for name in weight.names)


def source_in_blocks(source: Source) -> Callable[[str], bool]:
    """Return a function that says whether the source stores the tensor of a name in FP8 blocks."""
    return source.in_blocks if isinstance(source, HoldsBlocks) else lambda name: False


def num_bytes(weight: Weight, dtype: torch.dtype, *, fp8: bool) -> int:
    """How many bytes a parameter takes on the device: in FP8 blocks if `fp8`, else in its own dtype or `dtype`."""
    shape = weight.held_shape
    numel = math.prod(shape)
    if fp8:
        return numel + 4 * num_blocks(shape[0]) * num_blocks(shape[1])
    return numel * (weight.dtype or dtype).itemsize


def check(model_table: Mapping[str, Weight], source: Source) -> None:
    """Check that the source has all tensors of the table, with the right shapes. It reads only headers.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    _check_names(model_table, source)
    for parameter, weight in model_table.items():
        _check_shape(parameter, weight, source)


def unused(model_table: Mapping[str, Weight], source: Source) -> tuple[str, ...]:
    """Return the tensors that the table does not have, in order, without those that models compute themselves."""
    used = {name for weight in model_table.values() for name in weight.names}
    return tuple(sorted(name for name in source.names() - used if not _BENIGN.fullmatch(name)))


def _check_names(table: Mapping[str, Weight], source: Source) -> None:
    """Check that the source has every tensor that the model needs."""
    missing = sorted({name for weight in table.values() for name in weight.names} - source.names())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{source.description} lacks tensor {missing[0]}{more}, which the model needs")


def _check_shape(parameter: str, weight: Weight, source: Source) -> None:
    """Check that the tensors of a weight together have its shape."""
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
    """Read a parameter. One of several tensors is filled part by part, so that memory never holds it twice."""
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
    # The least and the largest number show every NaN and infinity, in one pass and without a copy.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{source.description} has NaN or infinite values in tensor {name} (as {dtype}); "
            "the file is damaged, download it again"
        )
    return tensor


def _assemble_blocks(weight: Weight, device: torch.device, source: HoldsBlocks, where: str) -> BlockWeight:
    """Read a parameter in FP8 blocks, whose parts are whole blocks."""
    rows, columns = weight.held_shape
    values = torch.empty(weight.held_shape, dtype=E4M3, device=device)
    scales = torch.empty(num_blocks(rows), num_blocks(columns), dtype=torch.float32, device=device)
    row = 0
    for name in weight.names:
        part = source.read_blocks(name, weight.part)
        at = slice(row // BLOCK, row // BLOCK + part.scales.shape[0])
        values[row : row + part.shape[0]] = part.values
        scales[at] = part.scales
        # NaN is the only e4m3 number that is not finite. All products are finite if the largest possible one is.
        numbers = values[row : row + part.shape[0]].view(torch.uint8)
        if ((numbers & 0x7F) == 0x7F).any() or not (scales[at] * E4M3_MAX).isfinite().all():
            raise CheckpointError(
                f"{where} has NaN or infinite values in tensor {name} (FP8 with scales); "
                "the file is damaged, download it again"
            )
        row += part.shape[0]
    return BlockWeight(values, scales)
