"""The interface to weights: Hugging Face's names, layout and config, whatever the files are.

The formats are in `engine.checkpoint.gguf` and `engine.checkpoint.safetensors`. `engine.checkpoint.loader` makes a
model's parameters of the tensors.
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
from engine.memory.superblocks import Superblocks


class Tensors(Protocol):
    """Tensors by name. A tensor is read when `read` is called."""

    def names(self) -> frozenset[str]:
        """Every tensor, by Hugging Face's name. A tensor without such a name keeps the name in its file."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor, contiguous, in Hugging Face's layout and in memory of its own, which is the CPU's for files.

        Raises:
            CheckpointError: there is no such tensor, or it is stored in a way that cannot be read.
        """
        ...


class Source(Tensors, Protocol):
    """An open checkpoint, whose files were checked when it was opened."""

    @property
    def description(self) -> str:
        """The file or folder, and how it is stored, in words for people."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The object of config.json, or the metadata of another format as such an object."""
        ...


@runtime_checkable
class HoldsBlocks(Protocol):
    """A source that may store tensors in FP8 blocks; `read` makes them plain."""

    def in_blocks(self, name: str) -> bool:
        """Whether a tensor is stored in FP8 blocks.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def read_blocks(self, name: str, part: Slice | None = None) -> BlockWeight:
        """Read the blocks of a tensor, or all blocks that a part of it touches, to the CPU. May be a view of the file.

        Args:
            name: of a tensor that is `in_blocks`
            part: None: the whole tensor

        Raises:
            CheckpointError: there is no such tensor, or its scales do not fit it.
        """
        ...


@runtime_checkable
class HoldsQuantised(Protocol):
    """A source that may store matrices as integers with scales; `read` makes them plain."""

    def quantised_kind(self, name: str) -> Kind | None:
        """The kind of a tensor that is stored as integers with scales; None for other tensors.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...

    def read_quantised(self, name: str) -> Quantised | Superblocks | None:
        """Read the integers and scales of such a tensor, in Hugging Face's layout. Return None for other tensors.

        Raises:
            CheckpointError: there is no such tensor.
        """
        ...


@runtime_checkable
class PartSource(Protocol):
    """A source that reads part of a matrix without the rest."""

    def read_part(self, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
        """Read only `part` of a matrix. Otherwise like `Tensors.read`, with the same errors."""
        ...


class LaidSource:
    """A base checkpoint with other tensors laid over it. They replace tensors of the same name and add new ones."""

    def __init__(self, base: Source, top: Tensors, description: str) -> None:
        """Lay `top` over `base`.

        Args:
            base: the checkpoint below
            top: the tensors laid over it
            description: where `top` comes from
        """
        self._base = base
        self._top = top
        self._on_top = top.names()
        self.description = f"{base.description}, with {description} laid over it"
        self.config = base.config
        self.replaced = tuple(sorted(base.names() & self._on_top))

    def names(self) -> frozenset[str]:
        return self._base.names() | self._on_top

    def shape(self, name: str) -> tuple[int, ...]:
        return (self._top if name in self._on_top else self._base).shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        return (self._top if name in self._on_top else self._base).read(name, dtype)

    def quantised_kind(self, name: str) -> Kind | None:
        holder = self._top if name in self._on_top else self._base
        return holder.quantised_kind(name) if isinstance(holder, HoldsQuantised) else None

    def read_quantised(self, name: str) -> Quantised | Superblocks | None:
        holder = self._top if name in self._on_top else self._base
        return holder.read_quantised(name) if isinstance(holder, HoldsQuantised) else None


def open_source(path: Path) -> Source:
    """Open a .gguf file, a folder with one .gguf file, or a folder with config.json and safetensors.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged, or its kind is unknown.
    """
    # Each format is imported only if it is needed, to save the time of importing the other.
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
