"""Reads parameters from safetensors files straight to a device, at the speed of the disk.

Threads read pieces of the files into a ring of page-locked buffers, and copy each to its place on the device without
waiting for the copy. So disk, host and device work at once, and host memory holds the ring and no more. What a tensor needs
after that (another dtype, numbers out of FP8 blocks, a look for NaN) is done on the device.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from engine.checkpoint.part import FilePlace, Slice
from engine.checkpoint.source import HoldsBlocks
from engine.errors import CheckpointError
from engine.memory.blocks import BLOCK, E4M3, E4M3_MAX, BlockWeight, num_blocks

PIECE = 8 << 20
"""Bytes that are read at once."""
BUFFERS = 16
"""Buffers of so many bytes in the ring."""


@runtime_checkable
class InFiles(HoldsBlocks, Protocol):
    """A source whose tensors lie in files as they are in memory."""

    @property
    def description(self) -> str:
        """The files, in words for people."""
        ...

    def place(self, name: str) -> FilePlace:
        """Where a tensor lies.

        Raises:
            CheckpointError: there is no such tensor, or it is of a dtype that is not read.
        """
        ...

    def scales(self, name: str, part: Slice | None) -> Tensor:
        """Read the scales of the blocks of a tensor that is `in_blocks`, or those that a part of it touches, as float32.

        Raises:
            CheckpointError: they are missing, or do not fit it.
        """
        ...


class _Buffer:
    """A page-locked buffer, and the copy that last read it."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.copied: torch.cuda.Event | None = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]


class Stream:
    """Threads that read, their buffers, and what has not been checked yet. Used by one thread, in a `with`."""

    def __init__(
        self, source: InFiles, device: torch.device, *, piece: int = PIECE, buffers: int = BUFFERS
    ) -> None:
        """Make the ring; nothing is read yet.

        Args:
            source: the files
            device: where parameters are made
            piece: bytes that are read at once
            buffers: how many pieces the ring has
        """
        self._source, self._device, self._piece = source, device, piece
        cuda = device.type == "cuda"
        self._copies: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(buffers):
            self._free.put(_Buffer(piece, pinned=cuda))
        self._threads = ThreadPoolExecutor(min(buffers, 8, os.cpu_count() or 1), "read-weights")
        self._files: dict[Path, int] = {}
        self._unchecked: list[tuple[Sequence[str], torch.dtype, Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._copies is not None:
            self._copies.synchronize()
        for file in self._files.values():
            os.close(file)

    def takes(self, names: Sequence[str], part: Slice | None) -> bool:
        """Whether `begin` can read these tensors: all of each, or rows of each that cut no block."""
        if part is None:
            return True
        whole = part.start % BLOCK == 0 == part.stop % BLOCK
        return part.dim == 0 and (whole or not any(self._source.in_blocks(name) for name in names))

    def begin(
        self,
        names: Sequence[str],
        part: Slice | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        fp8: bool,
    ) -> Callable[[], Tensor | BlockWeight]:
        """Begin to read a parameter.

        Args:
            names: its tensors, which are joined along dim 0
            part: the rows that are read of each, as `takes` allows; None: all
            shape: of the parameter
            dtype: of a plain parameter
            fp8: leave it in FP8 blocks, as all its tensors are stored

        Returns:
            what waits for it and returns it; to be called once

        Raises:
            CheckpointError: a tensor is missing or of a dtype that is not read; the function that is returned also
                raises it for files that end too early, and for NaN or infinite values.
        """
        if self._copies is not None:  # memory that the device's own work has freed may be used again
            self._copies.wait_stream(torch.cuda.current_stream(self._device))
        made = torch.empty(shape, dtype=E4M3 if fp8 else dtype, device=self._device)
        futures: list[Future[None]] = []
        scales: list[Tensor] = []
        stored: list[
            Tensor
        ] = []  # each tensor as stored, which is its part of the parameter if nothing is to be changed
        row = 0
        for name in names:
            place = self._source.place(name)
            start, stop = (
                (0, place.shape[0] if place.shape else 1) if part is None else (part.start, part.stop)
            )
            own = made[row : row + stop - start] if made.dim() else made
            if place.dtype != made.dtype:
                own = torch.empty(own.shape, dtype=place.dtype, device=self._device)
            if place.dtype == E4M3:
                scales.append(self._scales(name, part))
            stored.append(own)
            row_bytes = own.nbytes // max(1, stop - start)
            futures += self._read(place, start * row_bytes, own)
            row += stop - start
        joined = torch.cat(scales).to(self._device) if scales else None

        def end() -> Tensor | BlockWeight:
            for future in futures:
                future.result()
            if self._copies is not None:
                torch.cuda.current_stream(self._device).wait_stream(self._copies)
            if not fp8:
                self._convert(made, stored, joined)
            flags = [_damaged(one) for one in (stored if fp8 else _parts(made, stored))]
            self.check()
            if flags:
                self._unchecked.append((names, made.dtype, torch.stack(flags)))
            return BlockWeight(made, joined) if fp8 and joined is not None else made

        return end

    def check(self) -> None:
        """Look at the parameters that were made before: the device has had time for it.

        Raises:
            CheckpointError: one has NaN or infinite values.
        """
        while self._unchecked:
            names, dtype, flags = self._unchecked.pop(0)
            for name, damaged in zip(names, flags.tolist(), strict=True):
                if damaged:
                    raise CheckpointError(_damage(self._source.description, name, dtype))

    def _scales(self, name: str, part: Slice | None) -> Tensor:
        scales = self._source.scales(name, part)
        if not (scales * E4M3_MAX).isfinite().all():
            raise CheckpointError(_damage(self._source.description, name, E4M3))
        return scales

    def _convert(self, made: Tensor, stored: Sequence[Tensor], scales: Tensor | None) -> None:
        """Fill a plain parameter from tensors that are stored in another way."""
        row = block = 0
        for own in stored:
            rows = len(own) if own.dim() else 1
            if own.dtype == E4M3 and scales is not None:
                blocks = num_blocks(rows)
                plain = BlockWeight(own, scales[block : block + blocks]).dequantise(made.dtype)
                made[row : row + rows] = plain
                block += blocks
            elif own.dtype != made.dtype:
                (made[row : row + rows] if made.dim() else made).copy_(own)
            row += rows

    def _read(self, place: FilePlace, first: int, into: Tensor) -> list[Future[None]]:
        """Queue the pieces of a contiguous tensor, whose bytes lie from byte `first` of the stored one on."""
        if place.path not in self._files:
            self._files[place.path] = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
        file, at = self._files[place.path], place.offset + first
        flat = into.reshape(-1).view(torch.uint8)
        return [
            self._threads.submit(
                self._piece_to, file, place.path, at + begin, flat[begin : begin + self._piece]
            )
            for begin in range(0, flat.numel(), self._piece)
        ]

    def _piece_to(self, file: int, path: Path, at: int, into: Tensor) -> None:
        """Read a piece and send it to the device; in a thread of the ring."""
        buffer = self._free.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            piece = buffer.bytes[: into.numel()]
            _fill(file, path, at, piece)
            on: AbstractContextManager[object] = (
                nullcontext() if self._copies is None else torch.cuda.stream(self._copies)
            )
            with on:
                into.copy_(piece, non_blocking=True)
                if buffer.copied is not None:
                    buffer.copied.record(self._copies)
        finally:
            self._free.put(buffer)


def _fill(file: int, path: Path, at: int, piece: Tensor) -> None:
    """Read bytes from `at` on until the piece is full."""
    view = memoryview(piece.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        try:
            count = os.preadv(file, [view[done:]], at + done)
        except OSError as fault:
            raise CheckpointError(f"{path} cannot be read: {fault}") from None
        if not count:
            raise CheckpointError(
                f"{path} ends too early; it was changed while it was read, download it again"
            )
        done += count


def _parts(made: Tensor, stored: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the part of a parameter that each of its tensors makes."""
    if len(stored) == 1:
        return (made,)
    ends = list(itertools.accumulate(len(one) for one in stored))
    return [made[end - len(one) : end] for one, end in zip(stored, ends, strict=True)]


def _damaged(tensor: Tensor) -> Tensor:
    """Whether a tensor has NaN or infinite values: a bool on its device."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.bool, device=tensor.device)
    if tensor.dtype == E4M3:  # NaN is the only number of e4m3 that is not finite
        return ((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()
    return ~torch.stack(torch.aminmax(tensor)).isfinite().all()


def _damage(where: str, name: str, dtype: torch.dtype) -> str:
    """Say that a tensor is damaged."""
    how = "FP8 with scales" if dtype == E4M3 else f"as {dtype}"
    return (
        f"{where} has NaN or infinite values in tensor {name} ({how}); the file is damaged, download it again"
    )
