"""The report of `dsa inspect`: a plain object for JSON, and the same as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.loader import Weight, check, source_in_blocks, unused
from engine.checkpoint.overlay import read_overlay
from engine.checkpoint.packed import loaded_packed_bytes
from engine.checkpoint.quantisation import check_quantisation, published_in_blocks
from engine.checkpoint.safetensors import SafetensorsSource, read_object, weight_files
from engine.checkpoint.source import Source, open_source
from engine.config import PAGE_SIZE, WeightDtype
from engine.errors import CheckpointError, ConfigError
from engine.models import read_config, read_model
from engine.models.family import Family, Shape
from engine.protocol import IndexerInfo
from lab.inspect import roofline
from lab.inspect.ceilings import Ceilings
from lab.inspect.roofline import Asked
from lab.inspect.sizes import LoadedSizes, count, loaded_bytes, published_bytes
from lab.inspect.work import HeldModel

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Wanted:
    """What the user wants to serve."""

    context: int | None  # tokens of a request; None: all positions of the model
    concurrency: int  # requests at once
    dtype: str  # float32 | bfloat16
    cache_dtype: str  # auto | float32 | bfloat16 | fp8
    weight_dtype: WeightDtype = "auto"  # of weights stored in FP8 blocks; auto keeps them in FP8
    roofline: tuple[Ceilings, Asked] | None = None  # also say the floor of steps on such devices
    native: bool = (
        False  # as this CPU's native kernels hold it, where they can: packed weights, index keys in 8 bits
    )


@dataclass(frozen=True)
class Devices:
    """The devices to serve on."""

    count: int
    memory: int  # bytes of each device


def inspect(path: Path, overlay: Path | None, wanted: Wanted, devices: Devices) -> dict[str, Any]:
    """Report on a checkpoint, or on a config.json alone, without reading weights.

    Raises:
        CheckpointError: the files are damaged, incomplete, or of an unknown kind.
        ConfigError: the model does not have so much context, or does not know the dtype of cache or weights.
    """
    source, family, fp8 = _open(path)
    indexer: IndexerInfo | None = None
    whole = source
    if overlay is not None:
        if source is None:
            raise CheckpointError(f"{path} holds no weights, so {overlay} cannot be checked against them")
        laid = read_overlay(overlay, source)
        indexer, whole = laid.info, laid.over(source)
    shape = family.shape(indexer)
    if whole is not None:
        check(shape.table, whole)
    parameters = count(shape)
    packed = None if whole is None else loaded_packed_bytes(shape.table, whole)
    native = wanted.native and packed is not None and shape.native_cache is not None
    cache = _cache(shape, wanted, fp8, native)
    in_blocks = _in_blocks(whole, fp8)
    loaded = _loaded(shape.table, in_blocks, wanted)
    if wanted.weight_dtype == "fp8" and not loaded.fp8:
        raise ConfigError(
            f"--weight-dtype is fp8, but this {shape.architecture} has no weights that are stored in FP8 and could "
            "stay so; leave it at auto"
        )
    alone = _why_one_device(family, devices.count)
    first = shape.table if alone is not None else shape.rank_table(devices.count)
    # Each device has the whole cache: every head reads the same latents.
    weights = packed if native and packed is not None else _loaded(first, in_blocks, wanted).total
    each = weights + cache["bytes"]
    floors: dict[str, Any] = {}
    if wanted.roofline is not None:
        held = HeldModel(
            shape, devices.count if alone is None else 1, _DTYPES[wanted.dtype], cache["dtype"], in_blocks,
            keep_fp8=wanted.weight_dtype != "plain",
        )  # fmt: skip
        floors = {"roofline": roofline.report(held, *wanted.roofline)}
    return {
        "model": str(path) if source is None else source.description,
        "architecture": shape.architecture,
        "served": True,
        "layers": shape.num_layers,
        "positions": shape.max_positions,
        "index_top_k": shape.index_top_k,
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "indexer": parameters.indexer,
            "mtp": parameters.mtp,
        },
        "weights": {
            "file_bytes": _file_bytes(path, source, overlay, shape, fp8),
            "files": "on disk" if source is not None else "expected of this config",
            "fp8_blocks": fp8,
            "loaded_dtype": wanted.dtype,
            "loaded_bytes": loaded.total,
            "loaded_fp8_bytes": loaded.fp8,
            "dequantised_bytes": loaded.dequantised,
            "packed_bytes": packed,
            "packed": native,
        },
        "unused_tensors": [] if whole is None else list(unused({**shape.table, **shape.mtp}, whole)),
        "cache": cache,
        "fit": {
            "devices": devices.count,
            "device_bytes": devices.memory,
            "devices_used": devices.count if alone is None else 1,
            "not_split_because": alone,
            "needed_bytes": each,
            "fits": each <= devices.memory,
        },
        **floors,
    }


def _open(path: Path) -> tuple[Source | None, Family, bool]:
    """Open a checkpoint; return its weights if there are any, the model, and whether weights are in FP8 blocks."""
    file = path / "config.json" if path.is_dir() and not weight_files(path) else path
    if file.suffix != ".json" or not file.is_file():
        source = open_source(path)
        return source, read_model(source), bool(source.config.get("quantization_config"))
    if (path / "model.safetensors.index.json").exists():
        open_source(path)  # raises an error that says what is missing
    raw = read_object(file)
    return None, read_config(raw, str(file)), check_quantisation(raw, str(file))


def _file_bytes(path: Path, source: Source | None, overlay: Path | None, shape: Shape, fp8: bool) -> int:
    """Return the bytes of the weights in their files. If there are no files, those that DeepSeek would write are counted."""
    extra = 0 if overlay is None else overlay.stat().st_size
    if isinstance(source, SafetensorsSource):
        return extra + sum(source.stored_bytes(name) for name in source.names())
    if source is not None:
        files = [path] if path.is_file() else list(path.glob("*.gguf"))
        return extra + sum(file.stat().st_size for file in files)
    return published_bytes({**shape.table, **shape.mtp}, fp8=fp8, itemsize=2)


def _why_one_device(family: Family, count: int) -> str | None:
    """Say why the model cannot be split over so many devices (`--tensor-parallel`); None if it can."""
    try:
        family.check_split(count)
    except ConfigError as error:
        return str(error)
    return None


def _in_blocks(source: Source | None, fp8: bool) -> Callable[[str], bool]:
    """Return a predicate: is the tensor of this name stored in FP8 blocks? Without files, DeepSeek's way is assumed."""
    if source is not None:
        return source_in_blocks(source)
    return published_in_blocks if fp8 else lambda name: False


def _loaded(table: Mapping[str, Weight], in_blocks: Callable[[str], bool], wanted: Wanted) -> LoadedSizes:
    """Count the bytes of the weights in memory."""
    return loaded_bytes(table, _DTYPES[wanted.dtype], in_blocks, keep=wanted.weight_dtype != "plain")


def _cache(shape: Shape, wanted: Wanted, fp8: bool, native: bool) -> dict[str, Any]:
    """Make the report's `cache`: the bytes of keys, values and index keys.

    Raises:
        ConfigError: the model does not know the cache's dtype, or has fewer positions.
    """
    kind = wanted.cache_dtype
    if kind == "auto":
        kind = "fp8" if fp8 and "fp8" in shape.cache else wanted.dtype
    if kind not in shape.cache:
        raise ConfigError(
            f"a cache in {kind} is not known for {shape.architecture}; choose one of {', '.join(shape.cache)}"
        )
    context = shape.max_positions if wanted.context is None else wanted.context
    if context > shape.max_positions:
        raise ConfigError(f"--context is {context}, but the model has {shape.max_positions} positions")
    kv, index = shape.cache[kind]
    if native and shape.native_cache is not None:
        kind, (kv, index) = "bfloat16, index keys in 8 bits", shape.native_cache
    token = shape.num_layers * kv + shape.index_layers * index
    pages = -(-context // PAGE_SIZE)
    return {
        "dtype": kind,
        "kv_bytes_per_token_per_layer": kv,
        "index_bytes_per_token_per_layer": index,
        "bytes_per_token": token,
        "context": context,
        "concurrency": wanted.concurrency,
        "bytes": pages * PAGE_SIZE * token * wanted.concurrency,
    }


def render(report: Mapping[str, Any]) -> str:
    """Format the report as lines for people."""
    parameters, weights, cache, fit = (report[key] for key in ("parameters", "weights", "cache", "fit"))
    sparse = "" if report["index_top_k"] is None else f", index top_k {report['index_top_k']}"
    total = f"{_count(parameters['total'])}, {_count(parameters['active'])} active a token"
    if parameters["indexer"]:
        rest = parameters["total"] - parameters["indexer"]
        total += f" ({_count(rest)} and {_count(parameters['indexer'])} of lightning indexer)"
    size, dtype = _size(weights["loaded_bytes"]), weights["loaded_dtype"]
    if weights["loaded_fp8_bytes"]:
        kept, plain = _size(weights["loaded_fp8_bytes"]), _size(weights["dequantised_bytes"])
        loaded = (
            f"{size} in memory: {kept} stay in FP8, {plain} are dequantised to {dtype}; the head in float32"
        )
    else:
        loaded = f"{size} in {dtype}, the head in float32"
        if weights["fp8_blocks"]:
            loaded += "; FP8 weights are dequantised on loading"
    if weights["packed"]:
        loaded = f"{_size(weights['packed_bytes'])} in memory, packed as stored for the native kernels"
    elif weights["packed_bytes"] is not None:
        loaded += f"; {_size(weights['packed_bytes'])} packed as stored, on a CPU with the native kernels"
    kv, index = cache["kv_bytes_per_token_per_layer"], cache["index_bytes_per_token_per_layer"]
    each = f"{kv} + {index} bytes a token a layer ({cache['dtype']}; KV + index key)"
    lines = [
        ("model", report["model"]),
        (
            "architecture",
            f"{report['architecture']}, {report['layers']} layers, {report['positions']} positions{sparse}",
        ),
        ("parameters", total),
    ]
    if parameters["mtp"]:
        lines.append(("", f"{_count(parameters['mtp'])} more in MTP modules, which are not loaded"))
    lines += [
        ("weights", f"{_size(weights['file_bytes'])} in files ({weights['files']})"),
        ("", f"{loaded}"),
        ("cache", f"{each}, {cache['bytes_per_token']:,} bytes a token in all"),
        ("", f"{_size(cache['bytes'])} for {cache['concurrency']} x {cache['context']:,} tokens"),
    ]
    if report["unused_tensors"]:
        names = report["unused_tensors"]
        lines.append(("unused", f"{len(names)} tensors: {', '.join(names[:5])}{' ...' if names[5:] else ''}"))
    verdict, used = "fits" if fit["fits"] else "does not fit", fit["devices_used"]
    where = f"on each of {used} devices" if used > 1 else "on one device"
    needed = f"{_size(fit['needed_bytes'])} needed {where} besides activations"
    lines.append(("memory", f"{verdict}: {needed}, {_size(fit['device_bytes'])} there"))
    if used > 1:
        lines.append(("", f"with --tensor-parallel {used}; the cache is whole on each"))
    if fit["not_split_because"]:
        lines.append(("", fit["not_split_because"]))
    text = "\n".join(f"{label:13}{text}" for label, text in lines)
    return f"{text}\n\n{roofline.render(report['roofline'])}" if "roofline" in report else text


def _count(number: int) -> str:
    """Format a number of parameters, such as 671.9 B or 134.5 M."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def _size(number: int) -> str:
    """Format bytes, such as 642.1 GiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,} bytes"
