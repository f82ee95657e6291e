"""Loads the main model that an indexer is trained for."""

from __future__ import annotations

import torch

from engine.checkpoint.loader import load
from engine.checkpoint.source import Source
from engine.errors import ConfigError
from engine.models import read_model
from engine.models.gqa.family import Gqa
from engine.models.gqa.trunk import Trunk
from engine.models.gqa.weights import weight_table


def open_trunk(source: Source, dtype: torch.dtype, device: torch.device) -> Trunk:
    """Load a checkpoint's main model. An overlay's indexers and adapter are left out.

    Raises:
        CheckpointError: the config or a tensor is missing or damaged.
        ConfigError: the model's family has no trunk to train on.
    """
    family = read_model(source)
    if not isinstance(family, Gqa):
        raise ConfigError(
            f"{source.description} is a {source.config['model_type']} model; an indexer is trained for models with "
            "grouped-query attention only"
        )
    config = family.config
    weights, _ = load(weight_table(config, None), source, dtype=dtype, device=device)
    return Trunk(config, weights, config.max_positions, device)
