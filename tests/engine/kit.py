"""A bench for the engine in this process: tiny checkpoints, and every row's logits tapped off a real run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from engine.attention.batch import Batch
from engine.attention.tiling import Tiling
from engine.checkpoint.overlay import overlay_shapes, write_overlay
from engine.checkpoint.source import Source, open_source
from engine.config import EngineConfig
from engine.kernels.interface.composed import Composed
from engine.memory.planes import PagedCache
from engine.plan.cost import CostModel, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.tiles import TileCosts
from engine.plan.types import StepPlan, StepResult
from engine.protocol import Delta, IndexerInfo, SamplingParams, Submit
from engine.step.build import build
from engine.step.core import EngineCore
from engine.step.masking import TokenMasks
from engine.step.runner import AtOnce, Runner

VOCAB = 97


def tiny_checkpoint(folder: Path, seed: int = 0, kind: str = "llama", **changes: Any) -> LlamaForCausalLM:
    """A random model of this `model_type`, written as Hugging Face writes it; norms and biases are random too."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 640,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
        **changes,
    }
    config = AutoConfig.for_model(kind, **settings)
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
        elif name.endswith(".bias"):
            parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def random_overlay(
    path: Path, base: Source, *, heads: int = 3, dim: int = 16, rope: int = 8, rank: int = 3, seed: int = 1
) -> Path:
    """An untrained indexer and adapter, for arithmetic only. Scores are of both signs, norms not neutral."""
    info = IndexerInfo(
        num_heads=heads,
        head_dim=dim,
        rope_dim=rope,
        default_index_top_k=64,
        source=path.name,
        adapter_rank=rank,
    )
    generator = torch.Generator().manual_seed(seed)
    shapes = overlay_shapes(info, base)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.15 if "adapter" in name else 0.4)
        for name, shape in shapes.items()
    }
    write_overlay(path, tensors, info, "random", base)
    return path


class TapKernels:
    """Kernels that keep what they selected, call by call."""

    def __init__(self, kernels: object) -> None:
        self._kernels = kernels
        self.selected: list[Tensor] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._kernels, name)

    def select(self, scores: Tensor, index_top_k: Tensor) -> Tensor:
        selected: Tensor = self._kernels.select(scores, index_top_k)  # type: ignore[attr-defined]
        self.selected.append(selected)
        return selected

    def attend_sparse(self, *arguments: object) -> Tensor:
        # Run its parts one by one, so that `select` above sees the selection.
        return Composed.attend_sparse(self, *arguments)  # type: ignore[arg-type]


class TapModel:
    """A model that keeps the hidden states of its last forward, and each row's selections, layer by layer."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._kernels = TapKernels(model._kernels)  # type: ignore[attr-defined]
        model._kernels = self._kernels  # type: ignore[attr-defined]
        self.hidden: Tensor | None = None
        self.selected: dict[int, list[Tensor]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)

    def forward(self, batch: Batch, cache: PagedCache, costs: TileCosts) -> Tensor:
        self._kernels.selected.clear()
        self.hidden = self._model.forward(batch, cache, costs)  # type: ignore[attr-defined]
        self.selected = defaultdict(list)
        sparse = [tile for tile in Tiling(batch, costs).tiles if tile.form != "dense"]
        for call, selected in enumerate(self._kernels.selected):  # layers outside, tiles inside
            for row, chosen in zip(
                sparse[call % len(sparse)].rows.tolist(), selected.flatten(0, 1), strict=True
            ):
                self.selected[row].append(chosen[chosen >= 0])
        return self.hidden


class Lab:
    """One loaded model; each run gets a scheduler of its own over the same cache.

    Args:
        weights: what to load, in float32
        overlay: an indexer
        pages: of the cache; runs may use fewer
    """

    def __init__(self, weights: Path, overlay: Path | None = None, **settings: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 256 << 20}
        config = EngineConfig(
            weights=str(weights),
            overlay=None if overlay is None else str(overlay),
            **{**defaults, **settings},
        )
        self.built = build(config)
        self.sparse = self.built.ready.model.indexer is not None
        self.tap = TapModel(self.built.runner._model)
        runner = self.built.runner
        self.runner = Runner(self.tap, runner._cache, runner._costs, runner._device, runner._drafter)  # type: ignore[arg-type]

    def meter(self) -> Meter:
        """A meter of its own for each run; a clock that stands still costs nothing."""
        shape = self.built.runner._model.shape()
        return Meter(CostModel(shape, assumed_coefficients(shape, "cpu"), self.runner._costs))

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.tap.logits(hidden)  # type: ignore[operator]
        return logits

    def run(
        self,
        pages: int | None = None,
        budget: int = 512,
        running: int = 16,
        caching: bool = True,
        **drafting: Any,
    ) -> Run:
        """A fresh scheduler; what earlier runs left in the cache is unknown to it."""
        model = self.built.ready.model
        scheduler = Scheduler(
            pages or self.built.ready.capacity.num_pages,
            token_budget=budget,
            max_running=min(running, budget),
            max_model_len=model.max_model_len,
            prefix_caching=caching,
            **drafting,
        )
        return Run(self, scheduler)


class Run(AtOnce):
    """Requests through one scheduler, with the hidden state of every row ever computed."""

    def __init__(self, lab: Lab, scheduler: Scheduler) -> None:
        self.lab = lab
        self.core = EngineCore(scheduler, self, lab.meter(), sparse=lab.sparse, clock=lambda: 0.0)
        self.rows: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self.selected: dict[
            tuple[int, ...], list[Tensor]
        ] = {}  # (index_top_k, *tokens up to the row) -> by layer
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, Delta] = {}

    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """The core's runner: compute, and keep each row's hidden state."""
        result = self.lab.runner.run(plan, masks)
        hidden = self.lab.tap.hidden
        assert hidden is not None
        row = 0
        for request, sampled in zip(plan.requests, result.sampled, strict=True):
            held = max(0, len(sampled.token_ids) - 1)
            first_wrong = len(request.token_ids) - request.num_drafts + held
            for i in range(len(request.token_ids)):
                if i >= first_wrong:
                    row += 1
                    continue
                position = request.start + i
                self.rows[request.request_id][position].append(hidden[row])
                if row in self.lab.tap.selected:
                    known = self._known(request.request_id, request.token_ids, request.start)
                    key = (request.index_top_k or 0, *known[: position + 1])
                    self.selected[key] = self.lab.tap.selected[row]
                row += 1
        return result

    def submit(
        self,
        name: str,
        prompt: Sequence[int],
        max_tokens: int = 4,
        index_top_k: int | None = None,
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"max_tokens": max_tokens, "seed": 0, "temperature": 0.0} | sampling)
        self.tokens[name] = list(prompt)
        self.take(
            self.core.submit(
                Submit(
                    request_id=name, prompt_token_ids=tuple(prompt), sampling=params, index_top_k=index_top_k
                )
            )
        )

    def take(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ends, "a second terminal event"
            self.tokens[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta

    def step(self) -> None:
        output = self.core.step()
        assert output is not None
        self.take(output.deltas)

    def finish(self, each: Callable[[], None] = lambda: None) -> Run:
        while self.core.has_work:
            self.step()
            each()
        return self

    def _known(self, name: str, new: Sequence[int], start: int) -> list[int]:
        """A request's tokens up to the end of this step's rows."""
        return [*self.tokens[name][:start], *new]

    def masks(self, name: str, index_top_k: int, layers: int) -> list[Tensor]:
        """Each layer's selected sets as a mask [T, T] over the request's computed tokens."""
        tokens = self.tokens[name]
        masks = [torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril() for _ in range(layers)]
        for position in range(index_top_k, len(tokens) - 1):  # the last token was sampled, never computed
            for layer, chosen in enumerate(self.selected[(index_top_k, *tokens[: position + 1])]):
                masks[layer][position] = False
                masks[layer][position, chosen] = True
        return masks

    def error(self, name: str, reference: Tensor, positions: Iterable[int] | None = None) -> float:
        """Largest difference from `reference` [T, vocab] over the rows computed, relative to its largest logit."""
        worst = 0.0
        for position in self.rows[name] if positions is None else positions:
            for hidden in self.rows[name][position]:
                row = self.lab.logits(hidden.unsqueeze(0))[0]
                worst = max(worst, float((row - reference[position]).abs().max()))
        return worst / float(reference.abs().max())


def base_of(folder: Path) -> Source:
    return open_source(folder)
