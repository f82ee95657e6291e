"""A Hugging Face folder as a source: config.json and memory-mapped safetensors files, single or sharded.

Weights may be in FP8 with a scale for each block. `read` dequantises them, and `names` leaves out their scales.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint.part import FilePlace, Slice
from engine.checkpoint.quantisation import SCALE_SUFFIX, check_quantisation
from engine.errors import CheckpointError
from engine.memory.blocks import BLOCK, BlockWeight, num_blocks

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OVERLAY = "indexer.safetensors"  # may lie in the folder, but is not part of the checkpoint
_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = "F8_E4M3"
_SCALES = ("F32", "BF16", "F8_E8M0")  # F8_E8M0 is only an exponent; newer checkpoints use it for ue8m0
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, _FP8: torch.float8_e4m3fn,
}  # fmt: skip
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class SafetensorsFile:
    """One open, memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        """Map the file and read its header.

        Raises:
            CheckpointError: it is missing, unreadable, truncated, or its header is damaged.
        """
        self.path = path
        try:
            opened: Any = safe_open(path, framework="pt")  # its methods have no types
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({fault}); it is truncated or damaged, download it again"
            ) from None
        self._file = opened
        self.metadata: Mapping[str, str] = opened.metadata() or {}
        self._names: frozenset[str] = frozenset(opened.keys())
        self._header: tuple[int, dict[str, Any]] | None = None  # where the data begins, and what lies there

    def names(self) -> frozenset[str]:
        """Every tensor."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; raises CheckpointError where there is none of that name."""
        return tuple(self._slice(name).get_shape())

    def stored(self, name: str) -> str:
        """The dtype of a tensor in the format's words, such as BF16; raises the errors of `shape`."""
        return str(self._slice(name).get_dtype())

    def raw(self, name: str) -> Tensor:
        """Read a tensor as it is stored. It may be a view of the file. Raises the errors of `shape`."""
        self._slice(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def raw_part(self, name: str, part: Slice) -> Tensor:
        """Read only a part of a matrix, as it is stored. Raises the errors of `shape`."""
        span = slice(part.start, part.stop)
        tensor: Tensor = self._slice(name)[span] if part.dim == 0 else self._slice(name)[:, span]
        return tensor

    def place(self, name: str) -> FilePlace:
        """Where a tensor lies in the file. Raises the errors of `shape`, and of `read` for other numbers than floats."""
        if self.stored(name) != _FP8:
            self._check_plain(name)
        if self._header is None:
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._header = 8 + size, json.loads(file.read(size))
        first, header = self._header
        offset = first + header[name]["data_offsets"][0]
        return FilePlace(self.path, offset, _DTYPES[self.stored(name)], self.shape(name))

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor in the file; raises the errors of `shape`."""
        return math.prod(self.shape(name)) * _BYTES.get(self.stored(name), 1)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor as `dtype`, in memory of its own.

        Raises:
            CheckpointError: there is no tensor of that name, or its numbers are not plain floats.
        """
        self._check_plain(name)
        return self.raw(name).to(dtype, copy=True)

    def read_part(self, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
        """Read only a part of a matrix, as `dtype`. Raises the errors of `read`."""
        self._check_plain(name)
        return self.raw_part(name, part).to(dtype, copy=True).contiguous()

    def _check_plain(self, name: str) -> None:
        stored = self.stored(name)
        if stored not in _FLOATS:
            raise CheckpointError(
                f"{self.path} stores tensor {name} as {stored}, but weights must be one of {', '.join(_FLOATS)}; "
                "use the unquantised checkpoint or a GGUF file"
            )

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
        raw, where = read_object(folder / "config.json"), str(folder / "config.json")
        self.config: Mapping[str, Any] = raw
        self._has_blocks = check_quantisation(raw, where)
        self._at = _open_shards(folder)
        self._scales = self._find_scales()
        files = len({file.path for file in self._at.values()})
        kind = ", FP8 blocks" if self._scales else ""
        self.description = f"{folder.name} (safetensors{kind}, {files} file{'s' if files > 1 else ''})"

    def names(self) -> frozenset[str]:
        """Every tensor of every file, without the scales of FP8 weights."""
        return frozenset(self._at.keys() - self._scales)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
            CheckpointError: there is no tensor of that name, or it is in FP8 and its scales do not fit.
        """
        file = self._holder(name)
        if file.stored(name) == _FP8:
            self._check_scales(name)
        return file.shape(name)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor. One in FP8 is made plain by `BlockWeight.dequantise`.

        Raises:
            CheckpointError: there is no tensor of that name, or its quantisation is not supported.
        """
        file = self._holder(name)
        if not self.in_blocks(name):
            return file.read(name, dtype)
        return self.read_blocks(name).dequantise(dtype)

    def in_blocks(self, name: str) -> bool:
        return self._holder(name).stored(name) == _FP8

    def read_blocks(self, name: str, part: Slice | None = None) -> BlockWeight:
        file, scales = self._holder(name), self.scales(name, part)
        if part is None:
            return BlockWeight(file.raw(name), scales)
        first, last = part.start // BLOCK, num_blocks(part.stop)
        blocks = Slice(part.dim, first * BLOCK, min(last * BLOCK, file.shape(name)[part.dim]))
        return BlockWeight(file.raw_part(name, blocks), scales)

    def scales(self, name: str, part: Slice | None) -> Tensor:
        self._check_scales(name)
        scale_name = name + SCALE_SUFFIX
        scales = self._holder(scale_name).raw(scale_name).float()
        if part is None:
            return scales
        first, last = part.start // BLOCK, num_blocks(part.stop)
        return scales.narrow(part.dim, first, last - first)

    def place(self, name: str) -> FilePlace:
        return self._holder(name).place(name)

    def read_part(self, name: str, part: Slice, dtype: torch.dtype) -> Tensor:
        if not self.in_blocks(name):
            return self._holder(name).read_part(name, part, dtype)
        plain = self.read_blocks(name, part).dequantise(dtype)
        return plain.narrow(part.dim, part.start % BLOCK, part.stop - part.start).contiguous()

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor in its file, with its scales.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        size = self._holder(name).num_bytes(name)
        scale_name = name + SCALE_SUFFIX
        return size + (self._at[scale_name].num_bytes(scale_name) if scale_name in self._scales else 0)

    def _holder(self, name: str) -> SafetensorsFile:
        try:
            return self._at[name]
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name}") from None

    def _find_scales(self) -> frozenset[str]:
        """The scales of the weights that are in FP8."""
        return frozenset(
            name
            for name in self._at
            if (weight := name.removesuffix(SCALE_SUFFIX)) != name
            and weight in self._at
            and self._at[weight].stored(weight) == _FP8
        )

    def _check_scales(self, name: str) -> None:
        """An FP8 weight has scales, and as many as it has blocks."""
        if not self._has_blocks:
            raise CheckpointError(
                f"{self._at[name].path} stores tensor {name} as {_FP8}, but config.json has no quantization_config "
                "that says how it is scaled"
            )
        scale_name = name + SCALE_SUFFIX
        if scale_name not in self._scales:
            raise CheckpointError(f"{self._folder} lacks tensor {scale_name}, the scales of the FP8 {name}")
        holder, shape = self._at[scale_name], self._at[name].shape(name)
        wanted = tuple(num_blocks(size) for size in shape)
        if len(shape) != 2 or holder.shape(scale_name) != wanted:
            raise CheckpointError(
                f"{holder.path} has {scale_name} {list(holder.shape(scale_name))}, but {name} {list(shape)} "
                f"needs one scale for each 128 x 128 block: {list(wanted)}"
            )
        if holder.stored(scale_name) not in _SCALES:
            raise CheckpointError(
                f"{holder.path} stores {scale_name} as {holder.stored(scale_name)}; scales must be one of "
                f"{', '.join(_SCALES)}"
            )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, in order, without the overlay that may lie there."""
    return sorted(path for path in folder.glob("*.safetensors") if path.name != _OVERLAY)


def _open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Open the files of a folder. Return each tensor's name -> its file."""
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
    """Open the shards that an index names, and check that they have the tensors that it says."""
    weight_map = read_object(index).get("weight_map")
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
            at.setdefault(tensor, file)  # the index lacks it; the loader reports it if it is unused
    return at


def read_object(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        CheckpointError: there is no such file, or it is not a JSON object.
    """
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
