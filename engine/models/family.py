"""The interface of a model family and of the models that it builds. Other code uses only this interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
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
    indexer: IndexerInfo | None  # the overlay's or the checkpoint's indexer; None: attention is dense

    @property
    def batch_device(self) -> torch.device:
        """Where a batch's tensors are to be."""
        ...

    @property
    def row_step(self) -> RowStep | None:
        """The model's step over rows, if it has one here: then tokens can stay on the device."""
        ...

    def prepare(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None = None,
    ) -> None:
        """Do before the first step what would make steps wait.

        Args:
            cache: that all steps will use
            max_rows: of a step that has a row of each request
            progress: told how much is done, of how much
            compilers: compile kernels together; None: kernels are compiled one by one
        """
        ...

    def plane_specs(self) -> tuple[PlaneSpec, ...]:
        """What the layers cache for each token."""
        ...

    def tile_costs(self, budget_bytes: int, forced: Literal["auto", "gather", "mask"]) -> TileCosts:
        """The numbers that decide how attention work of this model is cut.

        Args:
            budget_bytes: the most bytes of arrays of a tile
            forced: the form of sparse tiles; auto: the cheaper one
        """
        ...

    def shape(self) -> ModelShape:
        """The model's arithmetic and memory traffic, for the cost model."""
        ...

    @property
    def backend(self) -> str:
        """The name of the backend that computes the model's steps, as a calibration file has it."""
        ...

    def computed_by(self) -> dict[str, str]:
        """Say, for the engine's log, what computes each operation of a step, except sampling.

        The operations are index scores, selection, attention, products (with weights), norms and rotation, and steps:
        how what a step computes is launched. A model without an indexer has the first two not.
        """
        ...

    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        """Compute the batch's rows and write them to the cache. Return the hidden states after the last norm, [T, E].

        Args:
            batch: T rows
            cache: the model's
            costs: how rows are cut, if the kernels take tiles
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [N, E] -> [N, vocab_size] float32."""
        ...


STEP_SCORE_BYTES = 512 << 20
"""That the scores of a step over rows may take on a device, at the least: graphs have as many."""


class KernelCompilers(Protocol):
    """What compiles kernels in processes of its own: `engine.kernels.triton.compiling`."""

    def together(self) -> AbstractContextManager[None]:
        """Inside, nothing is launched: what launches would need is compiled."""
        ...

    def started(self) -> None:
        """From now on a kernel that has to be compiled is a request's delay, and is logged."""
        ...

    def close(self) -> None:
        """End the processes."""
        ...


class RowStep(Protocol):
    """A model's step over rows, whose tokens may be known to the device alone."""

    drawn: Tensor
    """[R] int64: the tokens that the last step drew. A row whose token id is -1 - i has the token drawn[i]."""

    def forward(self, batch: Batch, cache: PagedCache, budget_bytes: int) -> Tensor:
        """Hidden states [T, E] of a batch whose tensors are on the CPU. The next step may overwrite them."""
        ...

    def hidden_like(self) -> Tensor:
        """A tensor [1, E] of the hidden states' size, dtype and device."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: [N, E] -> [N, V] float32."""
        ...


class DraftLayer(Protocol):
    """A layer after the main model that predicts one more token."""

    @property
    def batch_device(self) -> torch.device:
        """Where a batch's tensors are to be."""
        ...

    def prepare(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None = None,
    ) -> None:
        """As `Model.prepare`."""
        ...

    def plane_specs(self, specs: tuple[PlaneSpec, ...]) -> tuple[PlaneSpec, ...]:
        """Return the main model's planes `specs`, extended to this layer."""
        ...

    def forward(self, batch: Batch, hidden: Tensor, cache: PagedCache, costs: TileCosts) -> Tensor:
        """Compute rows and write them to the cache: hidden states [T, E] -> [T, E].

        Args:
            batch: T rows; the token id of a row is that *after* its position
            hidden: [T, E], of the main model or of this layer
            cache: the main model's, with this layer's planes
            costs: how rows are cut into tiles
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [N, E] -> [N, vocab_size] float32."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and in which number formats."""

    kernels: Kernels
    max_positions: int  # the most positions of a request
    dtype: torch.dtype
    device: torch.device
    precision: Precision = field(default_factory=Precision)  # of the cache, the indexer and the weights
    ranks: Ranks = ALONE  # which part of the model this process holds; `check_split` has accepted the number
    batch_invariant: bool = False  # whether a row's bits may not depend on the rows beside it


@dataclass(frozen=True)
class AttentionShape:
    """What attention does in layers of one kind, for inspection."""

    layers: int
    index_layers: (
        int  # so many of them score and select by themselves; the others use another layer's selection
    )
    heads: int  # query heads of the whole model
    key_dim: int  # numbers of a cached token that a query head multiplies
    value_dim: int  # numbers of a cached token that a query head sums
    index_heads: int = 0  # 0: there is no indexer
    index_dim: int = 0
    window: int | None = None  # a row sees so many tokens; None: all up to its own
    expanded: tuple[int, int] | None = None
    """Key and value dims of a head after cached tokens are expanded for all heads; None: they are used as cached."""


@dataclass(frozen=True)
class Shape:
    """A model's weights and cache, for inspection (`dsa inspect`)."""

    architecture: str
    num_layers: int
    max_positions: int
    index_top_k: int | None  # what the indexer was trained to select; None: there is no indexer
    table: Mapping[str, Weight]
    rank_table: Callable[[int], Mapping[str, Weight]]  # number of devices -> of the first, which has most
    mtp: Mapping[str, Weight]  # weights of all MTP modules; empty if there is none
    expert_share: float  # the share of the routed experts that a token visits
    index_layers: int  # how many layers cache an index key
    cache: Mapping[str, tuple[int, int]]  # cache dtype -> bytes of (KV, index key) of a token in a layer
    attention: tuple[AttentionShape, ...]  # of all layers, one for each kind
    native_cache: tuple[int, int] | None = (
        None  # likewise, of the CPU's compiled kernels; None: they do not serve it
    )


class Family(Protocol):
    """One model of a family: it has the checked config, and builds the model from it.

    Each family's module has `read(raw config, where) -> Family`.
    """

    @property
    def max_positions(self) -> int:
        """The most positions that one request may use, as the config says."""
        ...

    @property
    def compiled_steps(self) -> bool:
        """Whether the CPU's compiled kernels do this family's whole step."""
        ...

    def shape(self, indexer: IndexerInfo | None) -> Shape:
        """The model's weights and bytes, with an overlay's indexer if there is one.

        Raises:
            CheckpointError: an overlay does not fit this family.
        """
        ...

    def check_split(self, count: int) -> None:
        """Check that the model can be split over `count` ranks.

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
            indexer: the overlay's indexer; None without an overlay
            on: where and in which number formats it computes
            progress: called with (bytes loaded, bytes in all)

        Raises:
            CheckpointError: the tensors are not what the config needs, or an overlay does not fit this family.
            ConfigError: the family or the checkpoint does not have the precision, or it cannot be batch invariant there.
        """
        ...

    def build_draft(
        self, source: Source, on: Placement, progress: Callable[[int, int], None]
    ) -> tuple[DraftLayer, frozenset[str]]:
        """Load the checkpoint's draft layer; return also the names of its tensors. Arguments as in `build`.

        Raises:
            CheckpointError: a tensor is missing or does not fit.
            ConfigError: the checkpoint has no draft layer.
        """
        ...
