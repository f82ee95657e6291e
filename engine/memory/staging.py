"""Small host buffers on their way to and from a device. Copies from and to pinned memory do not stop the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Staging:
    """Host buffers that are filled in turn and copied to the device. A buffer is given out again when its copy is done."""

    def __init__(self, dtype: torch.dtype, device: torch.device, count: int = 3) -> None:
        """Nothing is allocated yet.

        Args:
            dtype: of the numbers
            device: where they go
            count: buffers; with one more than there are steps in flight nobody waits
        """
        self._dtype, self._device = dtype, device
        self._buffers = [torch.empty(0, dtype=dtype)] * count
        self._copied: list[torch.cuda.Event | None] = [None] * count
        self._next = 0

    def take(self, size: int) -> Tensor:
        """A tensor [size] on the host to fill, until the next `send`."""
        copied = self._copied[self._next]
        if copied is not None:
            copied.synchronize()
        if len(self._buffers[self._next]) < size:
            self._buffers[self._next] = torch.empty(
                size, dtype=self._dtype, pin_memory=self._device.type == "cuda"
            )
        return self._buffers[self._next][:size]

    def send(self, to: Tensor) -> None:
        """Copy what `take` gave to `to`, a tensor on the device of at most its size."""
        to.copy_(self._buffers[self._next][: len(to)], non_blocking=True)
        if self._device.type == "cuda":
            event = self._copied[self._next] or torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._copied[self._next] = event
        self._next = (self._next + 1) % len(self._buffers)
