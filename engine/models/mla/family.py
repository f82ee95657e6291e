"""The DeepSeek-V3 family (decoders with latent attention), as `engine.models.family.Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.attention.precision import IndexFormat, LatentFormat
from engine.checkpoint.loader import LoadReport, load, source_in_blocks, stays_fp8, unused
from engine.checkpoint.source import Source
from engine.errors import CheckpointError, ConfigError
from engine.models.family import Family, Placement, Shape
from engine.models.mla.config import MlaConfig
from engine.models.mla.model import MlaModel
from engine.models.mla.mtp import MtpLayer
from engine.models.mla.shape import shape
from engine.models.mla.weights import mtp_table, weight_table
from engine.protocol import IndexerInfo


@dataclass(frozen=True)
class Mla:
    """One model of the DeepSeek-V3 family."""

    config: MlaConfig

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    @property
    def compiled_steps(self) -> bool:
        return False

    def shape(self, indexer: IndexerInfo | None) -> Shape:
        """Return the model's weights and bytes. An overlay is a CheckpointError: this family takes none."""
        self._refuse(indexer)
        return shape(self.config)

    def check_split(self, count: int) -> None:
        """Check that `count` divides all sizes that are split over ranks."""
        c = self.config
        sizes = {"attention heads": c.num_heads}
        if not all(c.moe_layers):
            sizes["inner dims of an MLP"] = c.intermediate_size
        if any(c.moe_layers):
            sizes["routed experts"] = c.moe.num_experts
            sizes["inner dims of the shared expert"] = c.moe.intermediate_size * c.moe.num_shared_experts
        for name, size in sizes.items():
            if size % count:
                raise ConfigError(
                    f"the model's {size} {name} cannot be split evenly over {count} devices; "
                    "choose another --tensor-parallel"
                )

    def build(
        self,
        source: Source,
        indexer: IndexerInfo | None,
        on: Placement,
        progress: Callable[[int, int], None],
    ) -> tuple[MlaModel, LoadReport]:
        self._refuse(indexer)
        if on.batch_invariant:
            raise ConfigError(
                f"batch_invariant is for the llama family; the kernels of {self.config.architecture} sum in an order that "
                "depends on how many rows there are; leave --batch-invariant out"
            )
        config, formats = self.config, self._formats(source, on)
        table, fp8 = weight_table(config, on.ranks), on.precision.resident(on.device)
        in_blocks = source_in_blocks(source)
        if on.precision.weights == "fp8" and not any(
            stays_fp8(weight, in_blocks) for weight in table.values()
        ):
            raise ConfigError(
                f"weight_dtype is fp8, but {source.description} has no weights in FP8 blocks that could stay so; "
                "leave it at auto, or serve an FP8 checkpoint"
            )
        weights, report = load(table, source, dtype=on.dtype, device=on.device, progress=progress, fp8=fp8)
        if on.ranks.count > 1:
            report = replace(report, unused=unused(weight_table(config), source))
        return MlaModel(config, weights, on.kernels, on.max_positions, *formats, on.ranks), report

    def build_draft(
        self, source: Source, on: Placement, progress: Callable[[int, int], None]
    ) -> tuple[MtpLayer, frozenset[str]]:
        """Load the first MTP module."""
        if not self.config.num_mtp_layers:
            raise ConfigError(
                "drafter is mtp, but this checkpoint has no multi-token prediction layer; use ngram or off"
            )
        formats, table = self._formats(source, on), mtp_table(self.config, 0)
        fp8 = on.precision.resident(on.device)
        weights, _ = load(table, source, dtype=on.dtype, device=on.device, progress=progress, fp8=fp8)
        names = frozenset(name for weight in table.values() for name in weight.names)
        layer = MtpLayer(
            self.config, weights, on.kernels, on.max_positions, *formats, alone=on.ranks.count == 1
        )
        return layer, names

    def _formats(self, source: Source, on: Placement) -> tuple[LatentFormat, IndexFormat | None]:
        c, raw = self.config, source.config
        latent = on.precision.latent(raw, c.kv_lora_rank, c.qk_rope_head_dim, on.dtype)
        return latent, None if c.indexer is None else on.precision.index(raw, c.indexer.head_dim, on.dtype)

    def _refuse(self, indexer: IndexerInfo | None) -> None:
        if indexer is not None:
            raise CheckpointError(
                f"{indexer.source} is an indexer for models of the llama family, but this one is "
                f"{self.config.architecture}; serve it without an overlay"
            )


def read(raw: Mapping[str, Any], where: str) -> Family:
    """Read the object of a config.json; raises the errors of `MlaConfig.read`."""
    return Mla(MlaConfig.read(raw, where))
