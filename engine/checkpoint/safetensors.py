"""A Hugging Face folder as a source: config.json and safetensors files, memory-mapped, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.hf_config import normalise
from engine.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OVERLAY = "indexer.safetensors"  # lies in the folder, but is no part of the checkpoint
_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsFile:
    """One open, memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header.

        Raises:
            CheckpointError: it is missing, unreadable, truncated, or its header is damaged.
        """
        self.path = path
        try:
            opened: Any = safe_open(path, framework="pt")  # its methods are untyped
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({fault}); it is truncated or damaged, download it again"
            ) from None
        self._file = opened
        self.metadata: Mapping[str, str] = opened.metadata() or {}
        self._names: frozenset[str] = frozenset(opened.keys())

    def names(self) -> frozenset[str]:
        """Every tensor."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; raises CheckpointError where there is none of that name."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as `dtype`, in memory of its own.

        Raises:
            CheckpointError: there is none of that name, or its numbers are no plain floats.
        """
        stored = self._slice(name).get_dtype()
        if stored not in _FLOATS:
            raise CheckpointError(
                f"{self.path} stores tensor {name} as {stored}, but weights must be one of {', '.join(_FLOATS)}; "
                "quantised safetensors are not supported, use the unquantised checkpoint or a GGUF file"
            )
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.to(dtype, copy=True)  # what get_tensor gives may be a view of the file

    def _slice(self, name: str) -> Any:
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._file.get_slice(name)


class SafetensorsSource:
    """A folder with config.json and one or more safetensors files."""

    def __init__(self, folder: Path) -> None:
        """Open every file of the folder's checkpoint.

        Raises:
            CheckpointError: a file is missing or damaged, or the architecture is unknown.
        """
        self._folder = folder
        self.config: Mapping[str, Any] = normalise(_json(folder / "config.json"), str(folder / "config.json"))
        self._at = _open_shards(folder)
        files = len({file.path for file in self._at.values()})
        self.description = f"{folder.name} (safetensors, {files} file{'s' if files > 1 else ''})"

    def names(self) -> frozenset[str]:
        """Every tensor of every file."""
        return frozenset(self._at)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; raises CheckpointError where there is none of that name."""
        return self._holder(name).shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor; raises CheckpointError where there is none, or where it is quantised."""
        return self._holder(name).read(name, dtype)

    def _holder(self, name: str) -> SafetensorsFile:
        try:
            return self._at[name]
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order, less the overlay that may lie there too."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != _OVERLAY)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """The tensors of the checkpoint -> the file that holds each."""
    index = folder / _INDEX
    if index.exists():
        return _open_index(index)
    single = folder / _SINGLE
    if not single.exists():
        found = weight_files(folder)
        if not found:
            raise CheckpointError(
                f"{folder} holds no *.safetensors file (pickled *.bin checkpoints are not read)"
            )
        if len(found) > 1:
            raise CheckpointError(
                f"{folder} holds {len(found)} *.safetensors files but no {_INDEX} to join them"
            )
        single = found[0]
    file = SafetensorsFile(single)
    return dict.fromkeys(file.names(), file)


def _open_index(index: Path) -> dict[str, SafetensorsFile]:
    """The shards that an index names, checked against what it says is in them."""
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map that says which file holds which tensor")
    shards: dict[str, SafetensorsFile] = {}
    at: dict[str, SafetensorsFile] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} puts tensor {tensor} into {shard!r}, which is not a file name")
        if shard not in shards:
            if not (index.parent / shard).is_file():
                raise CheckpointError(
                    f"{index} puts tensor {tensor} into {shard}, but there is no such file beside it"
                )
            shards[shard] = SafetensorsFile(index.parent / shard)
        if tensor not in shards[shard].names():
            raise CheckpointError(
                f"{index} puts tensor {tensor} into {shard}, but that file does not hold it"
            )
        at[tensor] = shards[shard]
    for file in shards.values():
        for tensor in file.names():
            at.setdefault(tensor, file)  # the index forgot it; the loader says if nobody wants it
    return at


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, which a checkpoint needs") from None
    except OSError as fault:
        raise CheckpointError(f"{path} cannot be read: {fault}") from None
    except (ValueError, RecursionError) as fault:
        raise CheckpointError(f"{path} is not JSON: {fault}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content
