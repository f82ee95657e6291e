"""The architectures. `ARCHITECTURES` is the whole list: one file and one line to add another."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from engine.errors import CheckpointError
from engine.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from engine.attention.precision import Precision
    from engine.checkpoint.loader import LoadReport
    from engine.checkpoint.source import Source
    from engine.kernels.interface.attention import Kernels
    from engine.models.family import Model
    from engine.protocol import IndexerInfo

ARCHITECTURES: dict[str, str] = {
    "deepseek_v3": "engine.models.mla.model",
    "deepseek_v32": "engine.models.mla.model",
    "glm_moe_dsa": "engine.models.mla.model",
    "llama": "engine.models.gqa.model",
}
"""`model_type` of a checkpoint's config -> the module whose `build` makes it; imported only when served."""


def build_model(
    source: Source,
    indexer: IndexerInfo | None,
    kernels: Kernels,
    max_positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None],
    precision: Precision,
    ranks: Ranks = ALONE,
) -> tuple[Model, LoadReport]:
    """Load the model that `source` holds.

    Args:
        source: the checkpoint, with an overlay's tensors already laid over it
        indexer: the overlay's indexer, if one is laid over the checkpoint
        max_positions: positions that one request may use
        progress: called with (tensors loaded, tensors in all)
        precision: of the cache and the indexer
        ranks: which part of it this process holds; `check_split` said that it can be split so

    Raises:
        CheckpointError: an architecture that is not in the table, or a fault in the files.
        ConfigError: a precision that the architecture does not have.
    """
    built: tuple[Model, LoadReport] = _module(source).build(
        source,
        indexer,
        kernels,
        max_positions,
        dtype=dtype,
        device=device,
        progress=progress,
        precision=precision,
        ranks=ranks,
    )
    return built


def check_split(source: Source, count: int) -> None:
    """Whether the model can be split over `count` ranks.

    Raises:
        CheckpointError: an architecture that is not in the table.
        ConfigError: it cannot.
    """
    if count > 1:
        _module(source).check_split(source.config, count)


def _module(source: Source) -> ModuleType:
    kind = str(source.config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{source.description} is of architecture {kind!r}, which is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    return import_module(ARCHITECTURES[kind])
