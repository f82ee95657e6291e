"""Loading, walked from the model's side: the model says what it needs, the source is searched for it.

A tensor that is missing or of another shape is an error; one that nobody asked for is reported.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoint.source import LaidSource, Source
from engine.errors import CheckpointError

_BENIGN = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn_rot_embd\.weight)")
"""Tensors that checkpoints carry and models compute for themselves."""


@dataclass(frozen=True)
class Weight:
    """A parameter: one tensor of the checkpoint, or several laid one below the other (along dim 0).

    Attributes:
        names: Hugging Face's names, in order
        shape: of the parameter, so of all of them together
        rows: how many rows each name gives; checked if set, else only their sum is
        dtype: what to hold it in whatever the model's dtype is; None is the model's
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what was not."""

    num_tensors: int  # of the checkpoint
    num_parameters: int
    num_bytes: int  # on the device
    seconds: float
    unused: tuple[str, ...]  # tensors of the checkpoint that the model did not ask for
    replaced: tuple[str, ...]  # tensors of the base checkpoint that an overlay replaced


def load(
    model_table: Mapping[str, Weight],
    source: Source,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor], LoadReport]:
    """Read everything in the table.

    All names and shapes are checked before the first tensor is read.

    Args:
        model_table: parameter name -> what it is made of
        source: where to look
        dtype: of the parameters, where the table has no other
        device: where they go
        progress: called with (bytes loaded, bytes in all), the first time with 0

    Returns:
        the parameters under the table's names, and the report

    Raises:
        CheckpointError: a tensor is missing, has another shape, or holds NaN or infinite values.
    """
    started = time.monotonic()
    check(model_table, source)
    sizes = {name: _num_bytes(weight, dtype) for name, weight in model_table.items()}
    done, total = 0, sum(sizes.values())
    progress(done, total)
    loaded: dict[str, Tensor] = {}
    for parameter, weight in model_table.items():
        loaded[parameter] = _assemble(weight, weight.dtype or dtype, device, source)
        done += sizes[parameter]
        progress(done, total)
    return loaded, LoadReport(
        num_tensors=len({name for weight in model_table.values() for name in weight.names}),
        num_parameters=sum(tensor.numel() for tensor in loaded.values()),
        num_bytes=total,
        seconds=time.monotonic() - started,
        unused=unused(model_table, source),
        replaced=source.replaced if isinstance(source, LaidSource) else (),
    )


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
        return _read(weight.names[0], dtype, device, source)
    whole = torch.empty(weight.shape, dtype=dtype, device=device)
    row = 0
    for name in weight.names:
        part = _read(name, dtype, device, source)
        whole[row : row + part.shape[0]] = part
        row += part.shape[0]
    return whole


def _read(name: str, dtype: torch.dtype, device: torch.device, source: Source) -> Tensor:
    tensor = source.read(name, dtype).to(device)
    # The extremes carry every NaN and infinity, at one pass and no copy.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise CheckpointError(
            f"{source.description} has NaN or infinite values in tensor {name} (as {dtype}); "
            "the file is damaged, download it again"
        )
    return tensor


def _num_bytes(weight: Weight, dtype: torch.dtype) -> int:
    numel = 1
    for size in weight.shape:
        numel *= size
    return numel * (weight.dtype or dtype).itemsize
