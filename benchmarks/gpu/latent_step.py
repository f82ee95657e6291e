"""One layer with DeepSeek-V3.2's sizes on one GPU: its steps over flat rows, as graphs, dense and sparse.

    python -m benchmarks.gpu.latent_step [--out DIR] [--experts 16] [--streams 16] [--chunk 512]

A step embeds, computes one layer with 16 of the 256 experts (what a GPU of a 16-way expert-parallel group visits), and the
last norm. Weights and cache are in FP8 and random; they are made on the device. Seconds are between two events on the device
around a graph's replay; steps that are too large for a graph are launched kernel by kernel, and say so. A position is
that of a request's last token in the step, plus one: its whole context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.attention.batch import Batch, build_batch
from engine.attention.precision import Precision
from engine.checkpoint.random_weights import RandomSource
from engine.config import PAGE_SIZE
from engine.kernels.choice import load_backend
from engine.kernels.triton.compiling import Compilers
from engine.memory.blocks import E4M3
from engine.memory.layouts import LatentLayout
from engine.memory.planes import PagedCache
from engine.models import read_config
from engine.models.family import Placement
from engine.models.mla.model import MlaModel
from engine.models.rows.graphs import StepGraphs
from engine.models.rows.inputs import expanded_plan, row_inputs
from engine.plan.types import ScheduledRequest, StepPlan

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
K = 1024
DECODES = (2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)
CHUNKS = (512, 2 * K, 4 * K, 8 * K, 16 * K, 32 * K, 128 * K)
TOP_K = 2048
BUDGET = 1 << 30
"""Bytes of the scores of a step that is not a graph."""
MAX_LEN = 163_840


def config_of(experts: int, vocab: int = 129_280) -> dict[str, Any]:
    """DeepSeek-V3.2's config.json (huggingface.co/deepseek-ai/DeepSeek-V3.2-Exp), with one layer and fewer experts."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "attention_bias": False,
        "first_k_dense_replace": 0, "hidden_act": "silu", "hidden_size": 7168, "index_head_dim": 128, "index_n_heads": 64,
        "index_topk": TOP_K, "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": MAX_LEN,
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": experts,
        "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 1, "num_key_value_heads": 128, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn",
        },
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": vocab,
        "quantization_config": {
            "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
    }  # fmt: skip


def fill(cache: PagedCache, layers: int) -> None:
    """Random latents and index keys, of sizes that those of a model have."""
    for layer in range(layers):
        latents, keys = cache.plane(layer, "latent"), cache.plane(layer, "index_key")
        layout = LatentLayout(512, 64)
        for first in range(0, cache.num_pages, K):
            own = latents[first : first + K]
            tokens = own.shape[0] * PAGE_SIZE
            packed = layout.pack(
                torch.randn(tokens, 512, device=CUDA).to(E4M3),
                torch.rand(tokens, 4, device=CUDA) + 0.5,
                torch.randn(tokens, 64, device=CUDA),
            )
            own.copy_(packed.view(own.shape))
            part = keys[first : first + K]
            numbers = (
                torch.randn(part.shape[0], PAGE_SIZE * 128, device=CUDA).mul_(64).to(E4M3).view(torch.uint8)
            )
            scales = torch.full((part.shape[0], PAGE_SIZE), 2.0**-6, device=CUDA).view(torch.uint8)
            part.copy_(torch.cat((numbers, scales), dim=1).view(part.shape))


class Bench:
    """The model, its cache, and its graphs."""

    def __init__(self, experts: int, streams: int) -> None:
        self.raw = config_of(experts)
        family = read_config(self.raw, "config.json")
        source = RandomSource(self.raw, family.shape(None).table.values(), CUDA)
        on = Placement(load_backend("triton"), MAX_LEN, torch.bfloat16, CUDA, Precision("fp8", "fp8", "fp8"))
        model, _ = family.build(source, None, on, lambda done, total: None)
        assert isinstance(model, MlaModel)
        assert model.device_step is not None
        self.model, self.step = model, model.device_step
        self.pages = streams * 128 * K // PAGE_SIZE
        self.cache = PagedCache(self.pages, model.plane_specs(), model.num_layers, CUDA)
        fill(self.cache, model.num_layers)
        self.step.reserve(streams)
        self.graphs = StepGraphs(
            lambda inputs, _: self.step.compute(inputs, self.cache), self.step.sharing, streams, MAX_LEN, CUDA
        )
        self.graphs._width = TOP_K
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(0)).tolist()
        each = self.pages // streams
        self.tables = [tuple(order[i * each : (i + 1) * each]) for i in range(streams)]
        self.generator = torch.Generator().manual_seed(1)

    def batch(self, streams: int, context: int, tokens: int, top_k: int | None) -> Batch:
        """Each of so many requests computes its last tokens of a context."""
        ids = torch.randint(0, self.raw["vocab_size"], (streams, tokens), generator=self.generator).tolist()
        return build_batch(
            StepPlan(
                requests=tuple(
                    ScheduledRequest(
                        request_id=str(i), token_ids=tuple(own), start=context - tokens,
                        page_ids=self.tables[i][: -(-context // PAGE_SIZE)], index_top_k=top_k, sample=None,
                    )
                    for i, own in enumerate(ids)
                )
            ),
            CPU,
        )  # fmt: skip

    def launch(self, batch: Batch) -> tuple[Callable[[], object], bool]:
        """What runs a batch's step once more, and whether it is a graph."""
        graphs = self.graphs
        if graphs.run(batch) is not None:
            plan = expanded_plan(batch, self.step.sharing)
            shape = graphs._shape_of(batch, expanded=plan is not None)
            assert shape is not None
            return graphs._captured[shape].graph.replay, True
        inputs = row_inputs(batch, CUDA, BUDGET, self.step.sharing)
        return lambda: self.step.compute(inputs, self.cache), False

    def prepare(self, batch: Batch) -> None:
        """What a step needs, in `Compilers.together`."""
        plan = expanded_plan(batch, self.step.sharing)
        shape = self.graphs._shape_of(batch, expanded=plan is not None)
        if shape is not None:
            inputs = shape.inputs(self.graphs._padding(shape))
            if inputs.dense is None or plan is None or inputs.dense.holds(plan):
                self.step.compute(inputs, self.cache)
                return
        self.step.compute(row_inputs(batch, CUDA, BUDGET, self.step.sharing), self.cache)

    def seconds(self, launch: Callable[[], object], count: int) -> list[float]:
        """Of each of `count` steps."""
        for _ in range(2):
            launch()
        times = []
        for _ in range(count):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            launch()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        return times

    def profile(self, launch: Callable[[], object]) -> list[dict[str, Any]]:
        """Microseconds of each kernel of a step."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(3):
                launch()
            torch.cuda.synchronize()
        found = [
            {"kernel": e.key[:90], "us": e.device_time_total / 3, "launches": e.count / 3}
            for e in seen.key_averages()
            if e.device_time_total
        ]
        return sorted(found, key=lambda one: -one["us"])


def main() -> None:
    """Time the steps, profile the longest, write latent_step.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=512)
    args = parser.parse_args()
    began = time.perf_counter()
    bench = Bench(args.experts, args.streams)
    torch.cuda.synchronize()
    print(f"made in {time.perf_counter() - began:.1f} s", flush=True)
    cases = [("decode", args.streams, context, 1) for context in DECODES]
    cases += [("prefill", 1, context, args.chunk) for context in CHUNKS]
    asked = [
        (phase, streams, context, tokens, attention)
        for phase, streams, context, tokens in cases
        for attention in ("sparse", "dense")
        if attention == "dense" or context > TOP_K
    ]
    compilers = Compilers()
    with torch.inference_mode(), compilers.together():
        for _, streams, context, tokens, attention in asked:
            bench.prepare(bench.batch(streams, context, tokens, TOP_K if attention == "sparse" else None))
    compilers.close()
    print(f"compiled at {time.perf_counter() - began:.1f} s", flush=True)
    result: dict[str, Any] = {
        "points": [], "model": bench.raw, "machine": torch.cuda.get_device_name(), "profiles": {},
        "computed_by": bench.model.computed_by(),
    }  # fmt: skip
    longest = max(DECODES[-1], CHUNKS[-1])

    def save() -> None:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "latent_step.json").write_text(json.dumps(result, indent=1) + "\n")

    with torch.inference_mode():
        for phase, streams, context, tokens, attention in asked:
            try:
                batch = bench.batch(streams, context, tokens, TOP_K if attention == "sparse" else None)
                launch, graph = bench.launch(batch)
                seconds = bench.seconds(launch, 30 if phase == "decode" else 12)
                point = {
                    "phase": phase, "attention": attention, "position": context - tokens,
                    "tokens": streams * tokens, "seconds": seconds, "graph": graph,
                }  # fmt: skip
                result["points"].append(point)
                median = statistics.median(seconds) * 1e3
                print(f"{phase:8} {attention:7} {context:7} {median:9.3f} ms {'' if graph else 'no graph'}", flush=True)  # fmt: skip
                if context == longest:
                    parts = bench.profile(launch)
                    result["profiles"][f"{phase} {attention} {context}"] = parts
                    print(f"  kernels {sum(one['us'] for one in parts):.0f} us", flush=True)
                    for one in parts[:40]:
                        print(f"    {one['us']:9.1f} us {one['launches']:5.1f} x {one['kernel']}", flush=True)
            except Exception as error:
                print(f"{phase} {attention} {context} FAILED {type(error).__name__}: {error}", flush=True)
                traceback.print_exc(limit=4)
            save()
        hidden = bench.step.hidden_like().expand(args.streams, -1).contiguous()
        result["head_seconds"] = statistics.median(bench.seconds(lambda: bench.model.logits(hidden), 20))
        print(f"head {result['head_seconds'] * 1e3:.3f} ms", flush=True)
    save()


if __name__ == "__main__":
    main()
