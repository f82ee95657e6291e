"""Sparse beside dense at a larger shape: Qwen2.5-Coder-1.5B's, with random weights and an untrained indexer, on one GPU.

    python -m benchmarks.gpu.shape [--out DIR]

Decodes at several contexts, whose cache holds random numbers, launched as the engine launches them: the next step while
this one computes. Then whole prompts through the engine's loop. Untrained selections are as spread as can be, so what
is gathered lies nowhere together. Medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.overlay import overlay_shapes
from engine.checkpoint.random_weights import RandomSource
from engine.config import PAGE_SIZE, EngineConfig
from engine.kernels.choice import choose_backend
from engine.kernels.triton.compiling import Compilers
from engine.memory.planes import PagedCache, page_bytes
from engine.models import read_config, read_model
from engine.models.family import Model, Placement
from engine.plan.cost import CostModel, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.plan.types import PENDING, SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import IndexerInfo, IndexTopK, SamplingParams, Submit
from engine.step.core import EngineCore
from engine.step.device_runner import DeviceRunner

CONFIG: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    "hidden_act": "silu", "use_sliding_window": False, "head_dim": 128,
}  # fmt: skip
TOP_K = 2048
INDEXER = IndexerInfo(num_heads=8, head_dim=64, rope_dim=32, default_index_top_k=TOP_K, source="random")
DECODES = tuple((streams, context) for context in (512, 8192, 30720) for streams in (1, 32))
PROMPTS = (2048, 8192, 30720)
BUDGET = 2048
STEPS = 40


class Source(RandomSource):
    """The checkpoint and its indexer."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        weights = read_config(settings, "config.json").shape(None).table.values()
        super().__init__(settings, weights, torch.device("cuda", 0))
        head = settings["head_dim"]
        for name, heads in (("q", settings["num_attention_heads"]), ("k", 2), ("v", 2)):
            for layer in range(settings["num_hidden_layers"]):
                at = f"model.layers.{layer}.self_attn.{name}_proj"
                self._shapes |= {
                    f"{at}.weight": (heads * head, settings["hidden_size"]),
                    f"{at}.bias": (heads * head,),
                }
        self._shapes |= overlay_shapes(INDEXER, self)


class Shape:
    """The model, and a cache full of random numbers."""

    def __init__(self) -> None:
        began = time.perf_counter()
        self.device = torch.device("cuda", 0)
        source, defaults = Source(CONFIG), EngineConfig(weights="")
        positions = CONFIG["max_position_embeddings"]
        kernels = choose_backend("triton", self.device)
        model: Model
        model, _ = read_model(source).build(
            source,
            INDEXER,
            Placement(kernels, positions, torch.bfloat16, self.device),
            lambda done, total: None,
        )
        specs = model.plane_specs()
        self.pages = 34 * (positions // PAGE_SIZE)
        self.cache = PagedCache(self.pages, specs, model.num_layers, self.device)
        print(f"{self.pages * page_bytes(specs, model.num_layers) / 1e9:.1f} GB of cache", flush=True)
        for layer in range(model.num_layers):
            for spec in specs:
                plane = self.cache.plane(layer, spec.name)
                if plane.is_floating_point():
                    plane.normal_()
                else:
                    plane.random_(0, 256)
                    _mend_scales(plane)
        compilers = Compilers()
        model.prepare(self.cache, 32, lambda done, total: None, compilers)
        assert model.row_step is not None
        self.runner = DeviceRunner(
            model, model.row_step, self.cache, defaults.score_budget_bytes, self.device
        )
        self.runner.prepare(compilers)
        compilers.close()
        self.model = model
        self.seconds = time.perf_counter() - began
        print(f"ready in {self.seconds:.1f} s", flush=True)

    def decode(self, streams: int, context: int, top_k: IndexTopK) -> dict[str, Any]:
        """Milliseconds a step of so many decodes, and the device's part: steps launched ahead leave nothing else."""
        width = -(-(context + STEPS + 8) // PAGE_SIZE)
        tables = [tuple(range(n * width, (n + 1) * width)) for n in range(streams)]
        params = SamplingParams(max_tokens=1 << 20, seed=0, temperature=0.0)

        def plan(number: int) -> StepPlan:
            token = 5 if number == 0 else PENDING
            spec = SampleSpec(params=params, output_index=number, prompt_len=context, history=())
            return StepPlan(
                requests=tuple(
                    ScheduledRequest(
                        request_id=str(n), token_ids=(token,), start=context + number, page_ids=tables[n],
                        index_top_k=top_k, sample=spec,
                    )
                    for n in range(streams)
                )
            )  # fmt: skip

        flights = [self.runner.launch(plan(0))]
        ended = []
        for number in range(1, STEPS):
            flights.append(self.runner.launch(plan(number)))
            flights.pop(0).result()
            ended.append(time.perf_counter())
        flights.pop(0).result()
        seconds = statistics.median(b - a for a, b in itertools.pairwise(ended[5:]))
        return {"step_ms": 1e3 * seconds, "tokens_s": streams / seconds}

    def prompt(self, length: int, top_k: IndexTopK) -> dict[str, Any]:
        """A prompt alone, to its first token, in chunks."""
        shape = self.model.shape()
        costs = CostModel(shape, assumed_coefficients(shape, "cuda"), self.model.tile_costs(1 << 26, "auto"))
        times = []
        for _ in range(4):
            scheduler = Scheduler(
                self.pages, token_budget=BUDGET, max_running=32, max_model_len=32768, prefix_caching=False,
                pace=CostPace(costs),
            )  # fmt: skip
            core = EngineCore(scheduler, self.runner, Meter(costs), sparse=True)
            tokens = tuple(int(n) for n in torch.randint(0, 150_000, (length,)))
            params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
            core.submit(Submit(request_id="a", prompt_token_ids=tokens, sampling=params, index_top_k=top_k))
            began = time.perf_counter()
            while core.has_work:
                core.step()
            times.append(time.perf_counter() - began)
        seconds = statistics.median(times[1:])
        return {"ms": 1e3 * seconds, "tokens_s": length / seconds}


def _mend_scales(plane: Tensor) -> None:
    """A page of index keys in 8 bits ends with 64 float32 scales, which random bytes are not."""
    plane.view(len(plane), -1)[:, PAGE_SIZE * INDEXER.head_dim :].view(torch.float32).fill_(0.02)


def measure(shape: Shape) -> dict[str, Any]:
    """All rows."""
    found: dict[str, Any] = {"ready_s": shape.seconds, "decode": [], "prompt": []}
    for streams, context in DECODES:
        for name, top_k in (("sparse", TOP_K), ("dense", None)):
            row = {"streams": streams, "context": context, "attention": name}
            found["decode"].append(row | shape.decode(streams, context, top_k))
            print(found["decode"][-1], flush=True)
    for length in PROMPTS:
        for name, top_k in (("sparse", TOP_K), ("dense", None)):
            found["prompt"].append({"prompt": length, "attention": name} | shape.prompt(length, top_k))
            print(found["prompt"][-1], flush=True)
    return found


def main() -> None:
    """Measure, and write shape.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path())
    asked = parser.parse_args()
    found = measure(Shape())
    (asked.out / "shape.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
