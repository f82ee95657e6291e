"""DeepSeek's multi-token prediction module as a draft layer (arXiv 2412.19437, section 2.2).

Row t takes the main model's hidden state of position t (after its last norm) and token t + 1, and predicts
token t + 2:

    h_t = Layer(eh_proj [enorm(embed(token_{t+1})) | hnorm(hidden_t)]),  logits = head(norm(h_t))

Its latents and index keys lie in the pages of the main model, as one more layer, in the slot of position t. With its
own normed output as the hidden state it predicts the tokens after t + 2. `engine.step.drafting` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

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
from engine.models.family import KernelCompilers
from engine.models.mla.config import MlaConfig
from engine.models.mla.layer import MlaLayer
from engine.plan.tiles import TileCosts

if TYPE_CHECKING:
    from engine.models.mla.device_draft import DraftStep


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
        *,
        alone: bool = True,
    ) -> None:
        """Build the module from its weights; arguments as for `MlaModel`. `alone`: this is the only rank."""
        self.config, self.max_positions = config, max_positions
        of = self.of = Parameters(weights)
        self._kernels = kernels
        index = () if index_format is None else (index_format.spec(frozenset({config.num_layers})),)
        self._specs = (latent_format.spec, *index)
        self.layer = MlaLayer(
            of,
            config,
            moe=True,
            indexer=config.indexer is not None,
            latent_format=latent_format,
            index_format=index_format,
        )
        self.rotary = RotaryTable(
            config.qk_rope_head_dim,
            config.rope_theta,
            max_positions,
            scaling=config.rope_scaling,
            device=of("norm").device,
        )
        self._draft_step = self._device_form() if alone and kernels.name == "triton" else None
        self._head = of("head").float() if self._draft_step is None else of("head")

    def _device_form(self) -> DraftStep | None:
        from engine.models.mla.device_draft import DraftStep  # needs Triton
        from engine.models.mla.device_layer import supports

        if not supports(self.layer, self._specs):
            return None
        return DraftStep(self.config, self.of, self.layer, self.rotary, self.max_positions)

    @property
    def batch_device(self) -> torch.device:
        """The CPU where a device step takes the batch from there in one copy."""
        return torch.device("cpu") if self._draft_step is not None else self._head.device

    def prepare(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None = None,
    ) -> None:
        """Capture graphs, on CUDA."""
        if self._draft_step is not None and self._head.device.type == "cuda":
            self._draft_step.capture(cache, max_rows, progress, compilers)

    def plane_specs(self, specs: tuple[PlaneSpec, ...]) -> tuple[PlaneSpec, ...]:
        last = self.config.num_layers
        return tuple(
            PlaneSpec(s.name, s.shape, s.dtype, layers=None if s.layers is None else s.layers | {last})
            for s in specs
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden: Tensor, cache: PagedCache, costs: TileCosts) -> Tensor:
        if self._draft_step is not None:
            return self._draft_step.forward(batch, hidden, cache, costs.budget_bytes).clone()
        of, eps = self.of, self.config.rms_norm_eps
        embedded = rms_norm(F.embedding(batch.token_ids, of("embed")), of("enorm"), eps)
        x = F.linear(torch.cat((embedded, rms_norm(hidden, of("hnorm"), eps)), dim=-1), of("eh_proj"))
        rotation = self.rotary.at(batch.positions)
        tiling = Tiling(batch, costs)
        none = [None] * len(tiling.tiles)
        x, _ = self.layer(self.config.num_layers, x, rotation, tiling, cache, self._kernels, none)
        return rms_norm(x, of("norm"), eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        if self._draft_step is not None:
            return self._draft_step.logits(hidden)
        return F.linear(hidden.float(), self._head)
