"""Random batches of flat rows, and what the definitions in `engine.kernels.reference.attention` say about each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels.reference.attention import ReferenceKernels
from engine.kernels.triton.rows import Rows
from engine.memory.layouts import IndexKeyLayout

PAGE = 64
REFERENCE = ReferenceKernels()


class Line(NamedTuple):
    """One row; request -1 is padding."""

    request: int
    position: int
    top_k: int


EDGES = [
    Line(0, 0, 1), Line(0, 62, 0), Line(0, 63, 5), Line(1, 64, 64), Line(1, 127, 0), Line(-1, -1, 0), Line(2, 128, 100),
    Line(2, 190, 7), Line(-1, -1, 9), Line(1, 65, 0),
]  # fmt: skip
"""One token, both sides of the ends of pages, k above the context, dense, sparse and padding side by side."""


def labelled(line: Line) -> Callable[[str], str]:
    """What says of a difference which row it is in."""
    return lambda text: f"{line}: {text}"


class Batch:
    """Rows over requests with page tables of their own, pages in random order."""

    def __init__(
        self, lines: Sequence[Line], pages: int, device: torch.device, seed: int = 0, spare: int = 0
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.lines, self.pages, self.device = list(lines), pages, device
        self.context = pages * PAGE
        requests = max(line.request for line in lines) + 1
        self.num_pages = requests * pages + 2
        order = torch.randperm(self.num_pages, generator=self.generator)
        self.block_table = order[: requests * pages].view(requests, pages).int()
        # Wider, as a batch with a longer request has it.
        table = torch.nn.functional.pad(self.block_table, (0, spare))
        self.rows = Rows(
            torch.tensor([max(line.request, 0) for line in lines], dtype=torch.int32).to(device),
            torch.tensor([line.position for line in lines], dtype=torch.int32).to(device),
            torch.tensor([line.top_k for line in lines], dtype=torch.int32).to(device),
            table.to(device),
        )

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def plane(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[num_pages, 64, *shape], its pages apart from one another as those of an engine's cache may be."""
        apart = self.random(self.num_pages, 3, PAGE, *shape, dtype=dtype)
        return apart[:, 1]

    def int8_plane(self, keys: Tensor) -> Tensor:
        apart = torch.zeros(self.num_pages, 2, PAGE, keys.shape[-1] + 4, dtype=torch.uint8)
        plane = apart[:, 1]
        REFERENCE.store_index_keys(plane, *self._everywhere(), keys.flatten(0, 1))
        return plane

    def fp8_plane(self, keys: Tensor) -> Tensor:
        plane = torch.zeros(self.num_pages, PAGE, keys.shape[-1] + 4, dtype=torch.uint8)
        values, scales = REFERENCE.quantise(keys.flatten(0, 1), "float")
        IndexKeyLayout(keys.shape[-1]).write(plane, *self._everywhere(), values, scales[:, 0])
        return plane

    def table_of(self, row: int) -> Tensor:
        """[1, P] int64, as the reference takes it."""
        return self.block_table[self.lines[row].request][None].long()

    def position_of(self, row: int) -> Tensor:
        return torch.tensor([[self.lines[row].position]])

    def _everywhere(self) -> tuple[Tensor, Tensor]:
        return torch.arange(self.num_pages).repeat_interleave(PAGE), torch.arange(PAGE).repeat(self.num_pages)
