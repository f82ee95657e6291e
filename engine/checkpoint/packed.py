"""Loads a model for the native CPU kernels. Matrices stay as the file quantises them; others become packed bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.loader import LoadReport, Weight, check, load, unused
from engine.checkpoint.source import HoldsQuantised, Source
from engine.errors import CheckpointError
from engine.kernels.native.packed import PackedWeight, packed_bytes
from engine.memory.arena import Arena
from engine.memory.quantised import GROUP, Kind, Quantised, quantise_4bit


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
    fewest: Kind = "q4" if any(_kind(weight, source) == "q4" for weight in packed.values()) else "bf16"

    def kind(weight: Weight) -> Kind:
        return _kind(weight, source) or (fewest if weight.may_lose_bits else "bf16")

    sizes = {
        name: packed_bytes(kind(weight), weight.shape[0], weight.shape[1]) for name, weight in packed.items()
    }
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
        weights[name] = _assemble(weight, source, kind(weight), arena.take(sizes[name]))
        done += sizes[name]
        progress(done, report.num_bytes + later)
    return weights, replace(
        report,
        num_tensors=len({name for weight in model_table.values() for name in weight.names}),
        num_parameters=sum(weight.numel() for weight in weights.values()),
        num_bytes=done,
        unused=unused(model_table, source),
    )


def _kind(weight: Weight, source: Source) -> Kind | None:
    """How the tensors of a parameter are quantised; None if they are not, or if they differ."""
    if not isinstance(source, HoldsQuantised):
        return None
    kinds = {source.quantised_kind(name) for name in weight.names}
    return kinds.pop() if len(kinds) == 1 else None


def _assemble(weight: Weight, source: Source, kind: Kind, memory: Tensor) -> PackedWeight:
    if _kind(weight, source) is None or not isinstance(source, HoldsQuantised):
        dtype = torch.float32 if kind == "q4" else torch.bfloat16
        whole, _ = load({"it": weight}, source, dtype=dtype, device=torch.device("cpu"))
        return PackedWeight.of(quantise_4bit(whole["it"]) if kind == "q4" else whole["it"], memory)
    parts = []
    for name in weight.names:
        part = source.read_quantised(name)
        assert part is not None
        numbers = [part.scales] if part.offsets is None else [part.scales, part.offsets]
        if not all(np.isfinite(some).all() for some in numbers):
            raise CheckpointError(
                f"{source.description} has NaN or infinite values in the scales of tensor {name}; "
                "the file is damaged, download it again"
            )
        parts.append(part)
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return PackedWeight.of(
        Quantised(
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.scales for part in parts]),
            np.concatenate(offsets) if offsets else None,
        ),
        memory,
    )
