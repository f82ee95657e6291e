"""The face of a model family, and of the models that it builds: all that is known of either outside its folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.precision import Precision
from engine.checkpoint.loader import LoadReport, Weight
from engine.checkpoint.source import Source
from engine.kernels.interface.attention import Kernels
from engine.memory.planes import PagedCache, PlaneSpec
from engine.parallel.ranks import ALONE, Ranks
from engine.plan.cost import ModelShape
from engine.plan.tiles import TileCosts
from engine.protocol import IndexerInfo


class Model(Protocol):
    """A decoder over a paged cache."""

    architecture: str
    num_layers: int
    num_parameters: int
    vocab_size: int
    max_positions: int
    indexer: IndexerInfo | None  # an overlay's or the checkpoint's own; None: attention is dense

    @property
    def batch_device(self) -> torch.device:
        """Where a batch's tensors are to be."""
        ...

    def prepare(self, cache: PagedCache, max_rows: int, progress: Callable[[int, int], None]) -> None:
        """Do before the first step what would make steps wait.

        Args:
            cache: that all steps will use
            max_rows: of a step that has a row of each request
            progress: told how much is done, of how much
        """
        ...

    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """What each layer caches of a token."""
        ...

    def tile_costs(self, budget_bytes: int, forced: Literal["auto", "gather", "mask"]) -> TileCosts:
        """How attention work of this model is sized and cut."""
        ...

    def shape(self) -> ModelShape:
        """The model's arithmetic and traffic, for the cost of its work."""
        ...

    def products(self) -> str:
        """What multiplies with weights, for the engine's log."""
        ...

    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        """Write the batch's rows to the cache; hidden states after the last norm, [T, hidden].

        Args:
            costs: how rows are cut, where the kernels take tiles
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab_size] float32."""
        ...


class DraftLayer(Protocol):
    """A layer after the main model that predicts one token further."""

    def plane_specs(self, specs: tuple[PlaneSpec, ...]) -> tuple[PlaneSpec, ...]:
        """The main model's planes, extended to this layer."""
        ...

    def forward(self, batch: Batch, hidden: Tensor, cache: PagedCache, costs: TileCosts) -> Tensor:
        """Rows whose token ids are those after each position, and hidden states [T, E] -> [T, E]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, E] -> [N, vocab_size] float32."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and in which numbers."""

    kernels: Kernels
    max_positions: int  # that one request may use
    dtype: torch.dtype
    device: torch.device
    precision: Precision = field(default_factory=Precision)  # of the cache, the indexer and the weights
    ranks: Ranks = ALONE  # which part of it this process holds; `check_split` said that it can be split so


@dataclass(frozen=True)
class Shape:
    """A model as inspection sees it."""

    architecture: str
    num_layers: int
    max_positions: int
    index_top_k: int | None  # of its indexer; None: it has none
    table: Mapping[str, Weight]
    rank_table: Callable[[int], Mapping[str, Weight]]  # number of devices -> of the first, which holds most
    mtp: Mapping[str, Weight]  # of all its MTP modules; empty where it has none
    expert_share: float  # of a token's routed experts
    index_layers: int  # that cache an index key
    cache: Mapping[str, tuple[int, int]]  # cache dtype -> bytes a token a layer of (KV, index key)


class Family(Protocol):
    """One model of a family: its config, read and checked, and what is made from it.

    Each family's module has `read(raw config, where) -> Family`. Its config is frozen and the family's own.
    """

    @property
    def max_positions(self) -> int:
        """Positions that one request may use at most."""
        ...

    def shape(self, indexer: IndexerInfo | None) -> Shape:
        """The model's weights and bytes, with an overlay's indexer if there is one.

        Raises:
            CheckpointError: an overlay does not fit this family.
        """
        ...

    def check_split(self, count: int) -> None:
        """Whether the model can be split over `count` ranks.

        Raises:
            ConfigError: it cannot.
        """
        ...

    def build(
        self,
        source: Source,
        indexer: IndexerInfo | None,
        on: Placement,
        progress: Callable[[int, int], None],
    ) -> tuple[Model, LoadReport]:
        """Load the model.

        Args:
            source: the checkpoint, with an overlay's tensors already laid over it
            indexer: the overlay's indexer, if one is laid over the checkpoint
            on: where and in which numbers it computes
            progress: called with (bytes loaded, bytes in all)

        Raises:
            CheckpointError: the tensors are not what the config needs, or an overlay does not fit this family.
            ConfigError: a precision that the family or the checkpoint does not have.
        """
        ...

    def build_draft(
        self, source: Source, on: Placement, progress: Callable[[int, int], None]
    ) -> tuple[DraftLayer, frozenset[str]]:
        """Load the checkpoint's own draft layer; also the names of its tensors. Arguments as in `build`.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
            ConfigError: the checkpoint has no draft layer.
        """
        ...
