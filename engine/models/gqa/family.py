"""The llama family (decoders with grouped-query attention), as `engine.models.family.Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from engine.checkpoint.loader import LoadReport, load
from engine.checkpoint.packed import can_pack, load_packed
from engine.checkpoint.source import Source
from engine.config import IndexerDtype
from engine.errors import ConfigError
from engine.kernels.interface.attention import Kernels
from engine.layers.linear import Held
from engine.memory.layouts import Int8KeyLayout
from engine.models.family import Family, Placement, Shape
from engine.models.gqa.config import GqaConfig
from engine.models.gqa.model import GqaModel
from engine.models.gqa.shape import shape
from engine.models.gqa.weights import weight_table
from engine.protocol import IndexerInfo


@dataclass(frozen=True)
class Gqa:
    """One model of the llama family."""

    config: GqaConfig

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    @property
    def compiled_steps(self) -> bool:
        return True

    def shape(self, indexer: IndexerInfo | None) -> Shape:
        return shape(self.config, indexer)

    def check_split(self, count: int) -> None:
        """Check that `count` is 1: models of this family cannot be split."""
        if count > 1:
            raise ConfigError(
                f"{self.config.architecture} models are served on one device, not on {count}; "
                "leave --tensor-parallel out"
            )

    def build(
        self,
        source: Source,
        indexer: IndexerInfo | None,
        on: Placement,
        progress: Callable[[int, int], None],
    ) -> tuple[GqaModel, LoadReport]:
        dtype, precision = on.dtype, on.precision
        name = str(dtype).removeprefix("torch.")
        if precision.weights == "fp8":
            raise ConfigError(
                f"weight_dtype is fp8, but {source.description} is a {self.config.architecture} model, whose weights "
                f"are held in {name}; leave it at auto"
            )
        for setting, asked in (("kv_cache_dtype", precision.kv_cache), ("indexer_dtype", precision.indexer)):
            if asked == "fp8" or (asked == "bf16" and dtype != torch.bfloat16):
                raise ConfigError(
                    f"{setting} is {asked}, but a {self.config.architecture} model keeps its cache in its own dtype, "
                    f"{name}; leave it at auto"
                )
        integer_keys = indexer is not None and _integer_keys(
            precision.indexer, indexer.head_dim, dtype, on.kernels
        )
        table = weight_table(self.config, indexer, short_queries=integer_keys)
        weights: Mapping[str, Held]
        if (
            on.kernels.name == "native"
            and on.device.type == "cpu"
            and dtype == torch.bfloat16
            and can_pack(table)
        ):
            weights, report = load_packed(table, source, progress=progress)
        else:
            weights, report = load(table, source, dtype=dtype, device=on.device, progress=progress)
        model = GqaModel(
            self.config,
            weights,
            indexer,
            on.kernels,
            on.max_positions,
            integer_keys=integer_keys,
            batch_invariant=on.batch_invariant,
        )
        return model, report

    def build_draft(self, *arguments: object, **more: object) -> NoReturn:
        """Raise ConfigError, because no model of this family has a draft layer."""
        raise ConfigError(
            "drafter is mtp, but this checkpoint has no multi-token prediction layer; use ngram or off"
        )


def read(raw: Mapping[str, Any], where: str) -> Family:
    """Read the object of a config.json; raises the errors of `GqaConfig.read`."""
    return Gqa(GqaConfig.read(raw, where))


def _integer_keys(asked: IndexerDtype, dim: int, dtype: torch.dtype, kernels: Kernels) -> bool:
    """Whether to cache index keys as 8-bit integers. `auto` does so if it is faster and the model's dtype is bfloat16.

    Raises:
        ConfigError: the settings ask for 8-bit integers, and keys of `dim` numbers do not fit.
    """
    if asked == "int8" and not Int8KeyLayout.fits(dim):
        raise ConfigError(
            f"indexer_dtype is int8, but this indexer's keys have {dim} numbers, and only a multiple of 4 up to 512 "
            "can be kept so; leave it at auto"
        )
    preferred = kernels.integer_keys and dtype is torch.bfloat16 and Int8KeyLayout.fits(dim)
    return asked == "int8" or (asked == "auto" and preferred)
