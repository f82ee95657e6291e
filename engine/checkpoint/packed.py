"""Loads a model for the native CPU kernels. Matrices stay as the file quantises them; others become packed bfloat16."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.loader import LoadReport, Weight, check, load, num_bytes, unused
from engine.checkpoint.source import HoldsQuantised, Source
from engine.errors import CheckpointError
from engine.kernels.native.packed import PackedWeight, can_chain, packed_bytes
from engine.memory.arena import Arena
from engine.memory.quantised import GROUP, Kind, Quantised, quantise_4bit
from engine.memory.superblocks import Superblocks


def can_pack(model_table: Mapping[str, Weight]) -> bool:
    """Whether all weights that may be packed can be: their rows must be whole groups."""
    return not any(weight.shape[1] % GROUP for weight in model_table.values() if weight.may_be_packed)


def load_packed(
    model_table: Mapping[str, Weight],
    source: Source,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Tensor | PackedWeight], LoadReport]:
    """Load all parameters of the table, in bfloat16 on the CPU. Every weight that may be packed is packed.

    Arguments, result and errors are those of `engine.checkpoint.loader.load`.
    """
    check(model_table, source)
    packed = {name: weight for name, weight in model_table.items() if weight.may_be_packed}
    plain = {name: weight for name, weight in model_table.items() if name not in packed}
    parts = _parts(packed, source)
    sizes = {name: _size(packed[name], some) for name, some in parts.items()}
    later = sum(sizes.values())
    tensors, report = load(
        plain,
        source,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        progress=lambda done, total: progress(done, total + later),
    )
    weights: dict[str, Tensor | PackedWeight] = {**tensors}
    done = report.num_bytes
    arena = Arena(list(sizes.values()))
    for name, weight in packed.items():
        memory = arena.take(sizes[name])
        if parts[name][0].stored and isinstance(source, HoldsQuantised):
            found = [_read(part, source, source.description) for part in parts[name]]
            weights[name] = PackedWeight.of(found, memory)
        else:
            weights[name] = PackedWeight.of(_made(weight, source, parts[name][0].kind), memory)
        done += sizes[name]
        progress(done, report.num_bytes + later)
    return weights, replace(
        report,
        num_tensors=len({name for weight in model_table.values() for name in weight.names}),
        num_parameters=sum(weight.numel() for weight in weights.values()),
        num_bytes=done,
        unused=unused(model_table, source),
    )


def loaded_packed_bytes(model_table: Mapping[str, Weight], source: Source) -> int | None:
    """How many bytes `load_packed` would load; None if the source has nothing quantised that stays so. Reads no weight."""
    packed = {name: weight for name, weight in model_table.items() if weight.may_be_packed}
    if not can_pack(packed):
        return None
    parts = _parts(packed, source)
    if not any(part.stored for some in parts.values() for part in some):
        return None
    plain = (weight for name, weight in model_table.items() if name not in packed)
    return sum(num_bytes(weight, torch.bfloat16, fp8=False) for weight in plain) + sum(
        _size(packed[name], some) for name, some in parts.items()
    )


class _Part(NamedTuple):
    """Neighbouring tensors of a parameter that are packed alike."""

    kind: Kind
    names: tuple[str, ...]
    outputs: int
    stored: bool  # whether the checkpoint has them in this kind


def _parts(packed: Mapping[str, Weight], source: Source) -> dict[str, list[_Part]]:
    """How each parameter will be packed."""
    stored = {name: _stored_kinds(weight, source) for name, weight in packed.items()}
    short = any(part.kind in ("q4", "q4_k") for some in stored.values() for part in some)
    return {
        name: stored[name]
        or [_Part("q4" if short and weight.may_lose_bits else "bf16", weight.names, weight.shape[0], False)]
        for name, weight in packed.items()
    }


def _size(weight: Weight, parts: list[_Part]) -> int:
    return sum(packed_bytes(part.kind, part.outputs, weight.shape[1]) for part in parts)


def _stored_kinds(weight: Weight, source: Source) -> list[_Part]:
    """How the tensors of a parameter are quantised; empty if not all are, or if they cannot be one packed weight."""
    if not isinstance(source, HoldsQuantised):
        return []
    found = [(name, source.quantised_kind(name)) for name in weight.names]
    parts = []
    for kind, group in itertools.groupby(found, key=lambda pair: pair[1]):
        if kind is None:
            return []
        names = tuple(name for name, _ in group)
        parts.append(_Part(kind, names, sum(source.shape(name)[0] for name in names), True))
    return parts if can_chain([part.outputs for part in parts]) else []


def _made(weight: Weight, source: Source, kind: Kind) -> Quantised | Tensor:
    """Read a parameter that is not stored quantised, or not in one way, and quantise it if it may lose bits."""
    dtype = torch.float32 if kind == "q4" else torch.bfloat16
    whole, _ = load({"it": weight}, source, dtype=dtype, device=torch.device("cpu"))
    return quantise_4bit(whole["it"]) if kind == "q4" else whole["it"]


def _read(part: _Part, source: HoldsQuantised, where: str) -> Quantised | Superblocks:
    """Read neighbouring tensors that are quantised alike as one matrix."""
    found = []
    for name in part.names:
        one = source.read_quantised(name)
        assert one is not None
        if not one.are_finite():
            raise CheckpointError(
                f"{where} has NaN or infinite values in the scales of tensor {name}; "
                "the file is damaged, download it again"
            )
        found.append(one)
    if len(found) == 1:
        return found[0]
    together = zip(*(one.arrays() for one in found), strict=True)
    return found[0].with_arrays(
        None if some[0] is None else np.concatenate([array for array in some if array is not None])
        for some in together
    )
