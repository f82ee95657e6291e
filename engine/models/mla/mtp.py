"""DeepSeek's multi-token prediction module as a draft layer (arXiv 2412.19437, section 2.2).

Row t takes the main model's hidden state of position t (after its last norm) and token t + 1, and predicts
token t + 2:

    h_t = Layer(eh_proj [enorm(embed(token_{t+1})) | hnorm(hidden_t)]),  logits = head(norm(h_t))

Its latents and index keys lie in the pages of the main model, as one more layer, in the slot of position t. With its
own normed output as the hidden state it predicts the tokens after t + 2. `engine.step.drafting` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.batch import Batch
from engine.attention.precision import IndexFormat, LatentFormat
from engine.attention.tiling import Tiling
from engine.kernels.interface.attention import Kernels
from engine.layers.linear import Parameters
from engine.layers.norm import rms_norm
from engine.layers.rope import RotaryTable
from engine.memory.blocks import Matrix
from engine.memory.planes import PagedCache, PlaneSpec
from engine.models.mla.config import MlaConfig
from engine.models.mla.model import MlaLayer
from engine.plan.tiles import TileCosts


class MtpLayer:
    """One MTP module. Its weights are named as in `mtp_table`."""

    def __init__(
        self,
        config: MlaConfig,
        weights: Mapping[str, Matrix],
        kernels: Kernels,
        max_positions: int,
        latent_format: LatentFormat,
        index_format: IndexFormat | None,
    ) -> None:
        self._config = config
        of = self._of = Parameters(weights)
        self._kernels = kernels
        self._head = of("head").float()
        self._layer = MlaLayer(
            of,
            config,
            moe=True,
            indexer=config.indexer is not None,
            latent_format=latent_format,
            index_format=index_format,
        )
        self._rotary = RotaryTable(
            config.qk_rope_head_dim,
            config.rope_theta,
            max_positions,
            scaling=config.rope_scaling,
            device=self._head.device,
        )

    def plane_specs(self, specs: tuple[PlaneSpec, ...]) -> tuple[PlaneSpec, ...]:
        last = self._config.num_layers
        return tuple(
            PlaneSpec(s.name, s.shape, s.dtype, layers=None if s.layers is None else s.layers | {last})
            for s in specs
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Tensor, cache: PagedCache, costs: TileCosts) -> Tensor:
        of, eps = self._of, self._config.rms_norm_eps
        embedded = rms_norm(F.embedding(batch.token_ids, of("embed")), of("enorm"), eps)
        x = F.linear(torch.cat((embedded, rms_norm(hidden, of("hnorm"), eps)), dim=-1), of("eh_proj"))
        rotation = self._rotary.at(batch.positions)
        tiling = Tiling(batch, costs)
        none = [None] * len(tiling.tiles)
        x, _ = self._layer(self._config.num_layers, x, rotation, tiling, cache, self._kernels, none)
        return rms_norm(x, of("norm"), eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self._head)
