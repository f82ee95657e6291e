"""One face for weights: Hugging Face's names, layout and config, whatever the files are.

The formats are `engine.checkpoint.gguf` and `engine.checkpoint.safetensors`; what a model does with the
tensors is `engine.checkpoint.loader`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from engine.checkpoint.part import Slice
from engine.errors import CheckpointError
from engine.memory.blocks import BlockWeight
from engine.memory.quantised import Kind, Quantised


class Tensors(Protocol):
    """Tensors by name, read when they are asked for."""

    def names(self) -> frozenset[str]:
        """Every tensor, in Hugging Face's names; what has none there keeps its own."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives.

        Raises:
            CheckpointError: no such tensor.
        """
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor on the CPU, contiguous, in Hugging Face's layout and in memory of its own.

        Raises:
            CheckpointError: no such tensor, or one stored in a way that cannot be read.
        """
        ...


class Source(Tensors, Protocol):
    """An open checkpoint. Opening it has checked the files."""

    @property
    def description(self) -> str:
        """For people: the file or folder, and how it is stored."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The object of config.json as it is in the file, or what the file's format says in its place."""
        ...


@runtime_checkable
class HoldsBlocks(Protocol):
    """A source that may store tensors in FP8 blocks; `read` makes those plain."""

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor is stored so; raises CheckpointError where there is none."""
        ...

    def read_blocks(self, name: str, part: Slice | None = None) -> BlockWeight:
        """One that is, or all blocks that a part of it touches, as stored, on the CPU and maybe a view of the file.

        Raises:
            CheckpointError: no such tensor, or its scales do not fit it.
        """
        ...


@runtime_checkable
class HoldsQuantised(Protocol):
    """A source that may store matrices as integers with scales; `read` makes those plain."""

    def quantised_kind(self, name: str) -> Kind | None:
        """How a tensor that is stored so is packed, None for another; raises CheckpointError where there is none."""
        ...

    def read_quantised(self, name: str) -> Quantised | None:
        """One that is, as stored, in Hugging Face's layout; None for another; errors as `quantised_kind`."""
        ...


@runtime_checkable
class PartSource(Protocol):
    """A source that reads part of a matrix without the rest."""

    def read_part(self, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
        """What `read` gives, cut to `part`; errors as there."""
        ...


class LaidSource:
    """A base checkpoint with other tensors laid over it: theirs first, the base's where they have none."""

    def __init__(self, base: Source, top: Tensors, description: str) -> None:
        """Lay `top` over `base`.

        Args:
            base: the checkpoint below
            top: tensors that add to the base's or replace them
            description: where `top` comes from
        """
        self._base = base
        self._top = top
        self._on_top = top.names()
        self.description = f"{base.description}, with {description} laid over it"
        self.config = base.config
        self.replaced = tuple(sorted(base.names() & self._on_top))

    def names(self) -> frozenset[str]:
        """The tensors of both."""
        return self._base.names() | self._on_top

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives; raises CheckpointError where neither has the tensor."""
        return (self._top if name in self._on_top else self._base).shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor that lies on top; raises CheckpointError where neither has it."""
        return (self._top if name in self._on_top else self._base).read(name, dtype)

    def quantised_kind(self, name: str) -> Kind | None:
        """See `HoldsQuantised`."""
        holder = self._top if name in self._on_top else self._base
        return holder.quantised_kind(name) if isinstance(holder, HoldsQuantised) else None

    def read_quantised(self, name: str) -> Quantised | None:
        """See `HoldsQuantised`."""
        holder = self._top if name in self._on_top else self._base
        return holder.read_quantised(name) if isinstance(holder, HoldsQuantised) else None


def open_source(path: Path) -> Source:
    """Open a .gguf file, a folder with one .gguf file, or a folder with config.json and safetensors.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, or of an unknown kind.
    """
    # Imported when needed: neither format should cost the start-up time of the other.
    if path.is_dir():
        from engine.checkpoint.safetensors import SafetensorsSource, weight_files

        ggufs = sorted(path.glob("*.gguf"))
        if not ggufs or ((path / "config.json").exists() and weight_files(path)):
            return SafetensorsSource(path)
        if len(ggufs) > 1:
            listed = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path} holds several .gguf files ({listed}); name the one to serve")
        path = ggufs[0]
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; give a .gguf file or a folder with config.json and safetensors"
        )
    if path.suffix.lower() != ".gguf":
        raise CheckpointError(
            f"{path} is not a checkpoint that can be opened; give a .gguf file, "
            "or the folder that holds config.json and the *.safetensors files"
        )
    from engine.checkpoint.gguf import GGUFSource

    return GGUFSource(path)
