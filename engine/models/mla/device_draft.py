"""The multi-token prediction module over flat rows, in CUDA graphs, as `engine.models.mla.device` computes the model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.kernels.triton.embed import embed
from engine.kernels.triton.norm import add_rms_norm
from engine.layers.linear import Parameters
from engine.layers.rope import RotaryTable
from engine.memory.planes import PagedCache
from engine.models.family import KernelCompilers
from engine.models.mla.config import MlaConfig
from engine.models.mla.device import sharing_of
from engine.models.mla.device_layer import DeviceLayer, Residual, head_logits, product
from engine.models.mla.layer import MlaLayer
from engine.models.rows.graphs import StepGraphs
from engine.models.rows.inputs import RowInputs, row_inputs


class DraftStep:
    """The device form of one module."""

    def __init__(
        self, config: MlaConfig, of: Parameters, layer: MlaLayer, rotary: RotaryTable, max_positions: int
    ) -> None:
        """Describe a module of these parameters, whose layer's weights become views of fused ones."""
        self._config, self._of, self._max_positions = config, of, max_positions
        self._layer = DeviceLayer(layer, config.num_layers, rotary)
        norm = of("norm")
        self._sharing, self._device = sharing_of(self._config, norm.dtype), norm.device
        self._graphs: StepGraphs | None = None
        self._drawn = torch.zeros(1, dtype=torch.int64, device=self._device)  # every token is known

    def capture(
        self,
        cache: PagedCache,
        max_rows: int,
        progress: Callable[[int, int], None],
        compilers: KernelCompilers | None,
    ) -> None:
        """Capture the graphs of steps; see `engine.models.rows.graphs`."""

        def compute(inputs: RowInputs, hidden: Tensor | None) -> Tensor:
            assert hidden is not None
            return self.compute(inputs, hidden, cache)

        index, given = self._config.indexer, self._of("norm").unsqueeze(0)
        self._graphs = StepGraphs(
            compute, self._sharing, max_rows, self._max_positions, self._device, given=given
        )
        self._graphs.capture_all(0 if index is None else index.index_top_k, progress, compilers)

    def forward(self, batch: Batch, hidden: Tensor, cache: PagedCache, budget_bytes: int) -> Tensor:
        """As `MtpLayer.forward`, of a batch whose tensors are on the CPU. The next step may overwrite what it returns."""
        made = None if self._graphs is None else self._graphs.run(batch, hidden)
        if made is None:
            made = self.compute(row_inputs(batch, self._device, budget_bytes, self._sharing), hidden, cache)
        return made

    def compute(self, inputs: RowInputs, hidden: Tensor, cache: PagedCache) -> Tensor:
        """Write the rows to the cache; hidden states [T, E] -> [T, E]; of padding anything finite."""
        of, eps = self._of, self._config.rms_norm_eps
        _, embedded = add_rms_norm(embed(inputs.token_ids, self._drawn, of("embed")), None, of("enorm"), eps)
        _, normed = add_rms_norm(hidden, None, of("hnorm"), eps)
        x = product(torch.cat((embedded, normed), dim=-1), of("eh_proj"))
        stream = self._layer(Residual(x, None), inputs, cache)
        return add_rms_norm(stream.x, stream.update, of("norm"), eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: [N, E] -> [N, V] float32."""
        return head_logits(hidden, self._of("head"))
