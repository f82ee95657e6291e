"""What the runner needs of a model, whatever its architecture."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from engine.attention.batch import Batch
from engine.memory.planes import PagedCache, PlaneSpec
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
