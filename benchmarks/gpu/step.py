"""The engine's step on one GPU, in this process: equal tokens, then speeds, then where a step's time goes.

    python -m benchmarks.gpu.step WEIGHTS [--overlay FILE] [--out DIR] [--only equality,decode,prompt,profile]

WEIGHTS is a GGUF file or a folder. Greedy; prompts are windows of this project's own pages, whose prefixes are not cached.
A speed is that of the whole step: plan, launches, kernels, drawing, the plan's result. Medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.config import PAGE_SIZE, EngineConfig
from engine.models.gqa.model import GqaModel
from engine.plan.meter import Meter
from engine.plan.pace import CostPace
from engine.plan.scheduler import Scheduler
from engine.protocol import IndexTopK, SamplingParams, Submit
from engine.step.build import Built, build
from engine.step.core import EngineCore, StepRunner
from server.text.loading import load_tokenizer
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
TOP_K = 512
"""What the default model's overlay says."""
SHAPES = ((1, 128), (1, 2048), (1, 7168), (8, 1024), (64, 1024), (256, 1024))
"""(streams, context) of decodes."""
PROMPTS = (512, 2048, 7168)
STEPS = 60
BUDGET = 2048
EQUAL_PROMPTS, EQUAL_TOKENS = 50, 24


class Bench:
    """One loaded engine, and as many schedulers as wanted."""

    def __init__(self, weights: Path, overlay: Path | None, kernels: str) -> None:
        began = time.perf_counter()
        config = EngineConfig(
            weights=str(weights), overlay=None if overlay is None else str(overlay), device="cuda",
            kv_cache_bytes=14 << 30, token_budget=BUDGET, max_running=256, kernels=kernels,  # type: ignore[arg-type]
        )  # fmt: skip
        self.built: Built = build(config)
        self.seconds = time.perf_counter() - began
        model = self.built.runner._model
        assert isinstance(model, GqaModel)
        self.model = model
        self.graphs_run: deque[torch.cuda.CUDAGraph] = deque(maxlen=2)
        """A step's two graphs: its rows, and the drawing of its tokens."""
        self.runner: StepRunner = self.built.ahead or self.built.runner
        replay = torch.cuda.CUDAGraph.replay

        def noted(graph: torch.cuda.CUDAGraph) -> None:
            self.graphs_run.append(graph)
            replay(graph)

        torch.cuda.CUDAGraph.replay = noted  # type: ignore[method-assign, assignment]
        print(f"{self.built.kernels}: built in {self.seconds:.1f} s", flush=True)

    def core(self, budget: int = BUDGET, pages: int | None = None, *, hits: bool = False) -> EngineCore:
        """A fresh loop over the same cache, or over its first `pages`; `hits`: with a prefix cache."""
        ready = self.built.ready
        scheduler = Scheduler(
            pages or ready.capacity.num_pages, token_budget=budget, max_running=min(256, budget),
            max_model_len=ready.model.max_model_len, prefix_caching=hits, pace=CostPace(self.built.costs),
        )  # fmt: skip
        return EngineCore(
            scheduler, self.runner, Meter(self.built.costs), sparse=ready.model.indexer is not None
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        top_k: IndexTopK,
        tokens: int,
        *,
        budget: int = BUDGET,
        pages: int | None = None,
        hits: bool = False,
    ) -> list[list[int]]:
        """What greedy decoding says to each prompt, all in company; with `hits` one after the other."""
        core = self.core(budget, pages, hits=hits)
        told: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for name, prompt in zip(told, prompts, strict=True):
            core.submit(_request(name, prompt, tokens, top_k))
            if hits:
                self._finish(core, told)
        self._finish(core, told)
        return list(told.values())

    def _finish(self, core: EngineCore, told: dict[str, list[int]]) -> None:
        while core.has_work:
            output = core.step()
            assert output is not None
            for delta in output.deltas:
                assert delta.error is None, delta.error
                told[delta.request_id].extend(delta.token_ids)

    def decoding(self, prompts: Sequence[Sequence[int]], top_k: IndexTopK) -> EngineCore:
        """A loop whose every request decodes."""
        core = self.core()
        for number, prompt in enumerate(prompts):
            core.submit(_request(str(number), prompt, 16 + 2 * STEPS + 40, top_k))
        begun: set[str] = set()
        while len(begun) < len(prompts):
            output = core.step()
            assert output is not None
            begun |= {delta.request_id for delta in output.deltas if delta.token_ids}
        return core

    def graphs(self, on: bool) -> None:
        """Whether decode steps run as graphs."""
        step = self.model.device_step
        if step is None:
            return
        if not on:
            self._kept, step._graphs = step._graphs, None
        else:
            step._graphs = self._kept


def _request(name: str, prompt: Sequence[int], tokens: int, top_k: IndexTopK) -> Submit:
    sampling = SamplingParams(max_tokens=tokens, seed=0, temperature=0.0)
    return Submit(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling, index_top_k=top_k)


def page_tokens(tokenizer: Tokenizer) -> list[int]:
    """This project's pages as one row of tokens."""
    text = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    return list(tokenizer.encode(text))


class Windows:
    """Stretches of a text, each from another place."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens * (1 + 20_000 // len(tokens))
        self._random = random.Random(0)

    def take(self, length: int) -> list[int]:
        """The next."""
        start = self._random.randrange(len(self._tokens) - length)
        return self._tokens[start : start + length]


def equality(bench: Bench, windows: Windows) -> dict[str, Any]:
    """How many of the prompts get the same tokens in other circumstances, sparse."""
    prompts = [windows.take(40 + 19 * number) for number in range(EQUAL_PROMPTS)]

    def alone(**more: Any) -> list[list[int]]:
        return [bench.generate([prompt], TOP_K, EQUAL_TOKENS, **more)[0] for prompt in prompts]

    first = alone()
    company = []
    for start in range(0, len(prompts), 8):
        company += bench.generate(prompts[start : start + 8], TOP_K, EQUAL_TOKENS)
    found = {"again": alone(), "in company of 7": company, "in chunks of 64": alone(budget=64)}
    bench.graphs(False)
    found["graphs off"] = alone()
    bench.graphs(True)
    bench.runner = bench.built.runner
    found["step by step"] = alone()
    bench.runner = bench.built.ahead or bench.built.runner
    tight = []
    for start in range(0, len(prompts), 8):
        own = prompts[start : start + 8]
        pages = -(-max(len(one) + EQUAL_TOKENS for one in own) // PAGE_SIZE) + 2  # far too few for eight
        tight += bench.generate(own, TOP_K, EQUAL_TOKENS, pages=pages)
    found["after preemption"] = tight
    found["on a prefix hit"] = [
        bench.generate([prompt, prompt], TOP_K, EQUAL_TOKENS, hits=True)[1] for prompt in prompts
    ]
    return {
        name: {
            "prompts": len(prompts),
            "equal": sum(a == b for a, b in zip(first, other, strict=True)),
            "first differences": [
                next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
                for a, b in zip(first, other, strict=True) if a != b
            ],
        }
        for name, other in found.items()
    }  # fmt: skip


def beside_torch(bench: Bench, plain: Bench, windows: Windows) -> dict[str, Any]:
    """How often torch's step over the same weights says the same."""
    prompts = [windows.take(60 + 45 * number) for number in range(16)]
    found: dict[str, Any] = {}
    for name, top_k in (("sparse", TOP_K), ("dense", None)):
        ours, theirs = (
            [one.generate([prompt], top_k, 16)[0] for prompt in prompts] for one in (bench, plain)
        )
        found[name] = {
            "first tokens equal": sum(a[0] == b[0] for a, b in zip(ours, theirs, strict=True)),
            "all 16 equal": sum(a == b for a, b in zip(ours, theirs, strict=True)),
            "prompts": len(prompts),
        }
    return found


def decode(bench: Bench, windows: Windows) -> list[dict[str, Any]]:
    """Tokens a second of all streams together."""
    rows = []
    for streams, context in SHAPES:
        for name, top_k in (("sparse", TOP_K), ("dense", None)):
            core = bench.decoding([windows.take(context) for _ in range(streams)], top_k)
            for _ in range(8):
                core.step()
            times = []
            for _ in range(STEPS):
                began = time.perf_counter()
                core.step()
                times.append(time.perf_counter() - began)
            core.abort_all()
            middle = statistics.median(times)
            rows.append(
                {"streams": streams, "context": context, "attention": name, "step_ms": 1e3 * middle,
                 "p90_ms": 1e3 * sorted(times)[int(0.9 * STEPS)], "tokens_s": streams / middle}
            )  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def prompt(bench: Bench, windows: Windows) -> list[dict[str, Any]]:
    """Tokens a second of a prompt alone, to its first token."""
    rows = []
    for length in PROMPTS:
        for name, top_k in (("sparse", TOP_K), ("dense", None)):
            times = []
            for _ in range(6):
                own = [windows.take(length)]
                began = time.perf_counter()
                bench.generate(own, top_k, 1)
                times.append(time.perf_counter() - began)
            middle = statistics.median(times[1:])
            rows.append(
                {"prompt": length, "attention": name, "ms": 1e3 * middle, "tokens_s": length / middle}
            )
            print(rows[-1], flush=True)
    return rows


def _last_graphs(bench: Bench) -> list[float]:
    """Microseconds of the graphs of the last step, each replayed back to back."""
    found = []
    for graph in tuple(bench.graphs_run):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        found.append(1e6 * (time.perf_counter() - began) / 20)
    return found


def profiled(bench: Bench, windows: Windows) -> list[dict[str, Any]]:
    """The kernels of a decode step, added by name, and what the host adds."""
    tables = []
    for streams, context, top_k in ((1, 7168, TOP_K), (1, 128, TOP_K), (64, 1024, TOP_K), (256, 1024, TOP_K)):
        core = bench.decoding([windows.take(context) for _ in range(streams)], top_k)
        for _ in range(8):
            core.step()
        began = time.perf_counter()
        for _ in range(10):
            core.step()
        wall = (time.perf_counter() - began) / 10
        graphs_us = _last_graphs(bench)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(10):
                core.step()
            torch.cuda.synchronize()
        core.abort_all()
        kernels = sorted(
            (
                (event.self_device_time_total / 10, event.count / 10, event.key)
                for event in trace.key_averages()
                if event.self_device_time_total > 0
            ),
            reverse=True,
        )
        tables.append(
            {"streams": streams, "context": context, "top_k": top_k, "step_us": 1e6 * wall,
             "graphs_us": graphs_us, "kernels_us": sum(us for us, _, _ in kernels),
             "kernels": [{"us": round(us, 1), "calls": round(count, 1), "name": name[:90]} for us, count, name in kernels[:24]]}
        )  # fmt: skip
        print(json.dumps(tables[-1], indent=0), flush=True)
    return tables


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--overlay", type=Path)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--only", default="equality,torch,decode,prompt,profile")
    asked = parser.parse_args()
    windows = Windows(page_tokens(load_tokenizer(asked.weights)))
    bench = Bench(asked.weights, asked.overlay, "triton")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "build_s": bench.seconds}
    parts = {"equality": equality, "decode": decode, "prompt": prompt, "profile": profiled}
    for name in asked.only.split(","):
        began = time.perf_counter()
        if name == "torch":
            found[name] = beside_torch(bench, Bench(asked.weights, asked.overlay, "torch"), windows)
        else:
            found[name] = parts[name](bench, windows)
        found.setdefault("seconds", {})[name] = time.perf_counter() - began
        if name in ("equality", "torch"):
            print(json.dumps(found[name]), flush=True)
        (asked.out / "step.json").write_text(json.dumps(found, indent=1))
    print(found["seconds"])


if __name__ == "__main__":
    main()
