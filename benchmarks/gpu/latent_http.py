"""A few layers of DeepSeek-V3.2 over HTTP on one GPU: a real `dsa serve` with random weights, under load.

    python -m benchmarks.gpu.latent_http [--out DIR] [--layers 4] [--only base,mtp,shared] [--contexts 8192,131072]
        [--streams 1,16,64] [--distinct 16,2] [--dense base] [--tokens 96] [--seconds 280] [--quick] [-- FLAGS OF dsa serve]

Layers have the published sizes, all 256 experts, FP8 weights and cache, and the model has the whole vocabulary. Sparse (2048
selected), and dense for the variants of `--dense`. Variants: `base`; `mtp`, with a draft layer; `shared`, where the first
layer selects for four.

- prefill: each distinct prompt once, the first one alone: time to its first token.
- decode: many streams whose prompts are in the prefix cache: tokens a second while all decode, and the gaps of a stream.

What is not as in real use: there are only `--distinct` different prompts of a context, because a GPU would take minutes
to read 64 of them, and streams share them in turn. Streams of one prompt read the same pages, so a part of what attention
reads comes from the L2 cache. Their tokens are drawn, and differ: equal ones would visit the same few experts. Random weights never accept a draft, so `mtp` shows what drafts cost, not what they gain. A
few layers have less cache than 61 and the same head and host's work in a step, which are the larger part of it.

The file latent_http.json is written after each case. What does not fit into `--seconds` is left out and named.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.resources
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvloop

from benchmarks.gpu.http import show
from lab.bench.crowd import Crowd, CrowdReport, ask, environment
from lab.bench.errors import BenchError
from lab.bench.machine import describe
from lab.bench.servers import LocalServer
from lab.bench.timing import decode_rate_of_all, gap_percentiles

VARIANTS: Mapping[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "base": ({}, ()),
    "mtp": ({"num_nextn_predict_layers": 1}, ("--drafter", "mtp")),
    "shared": ({"index_topk_freq": 4, "index_skip_topk_offset": 1}, ()),
}
"""Name -> changes of the config, and flags of `dsa serve`."""
MODES: Mapping[str, dict[str, Any]] = {"sparse": {}, "dense": {"dsa": {"top_k": "dense"}}}
"""Name -> fields of a request's body."""
QUICK = {
    "hidden_size": 256, "q_lora_rank": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "kv_lora_rank": 128,
    "index_n_heads": 4, "index_topk": 64, "moe_intermediate_size": 128, "n_routed_experts": 16, "vocab_size": 512,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Sizes with `--quick`, which only shows that the program works."""
READY_SECONDS = 150.0
FEWEST_SECONDS = 5.0
"""No case begins with less time than this."""
_SERVE = "from server.cli.main import main; main()"


def config(layers: int, *, quick: bool, **changes: Any) -> dict[str, Any]:
    """Return a config.json of so many layers of experts."""
    path = importlib.resources.files("engine").joinpath("models", "mla", "configs", "deepseek-v3.2.json")
    raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
    own = {"num_hidden_layers": layers, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
    return raw | own | (QUICK if quick else {}) | changes


class Clock:
    """The time that the whole program has."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self._end - time.monotonic()

    def allows(self, least: float = FEWEST_SECONDS) -> bool:
        """Whether there are so many seconds left."""
        return self.left >= least


class Bench:
    """One running server, and the prompts that it has read."""

    def __init__(self, server: LocalServer, vocabulary: int, clock: Clock, seed: str) -> None:
        self.server = server
        self._vocabulary = vocabulary
        self._clock = clock
        self._seed = seed

    def prompts(self, context: int, count: int) -> list[list[int]]:
        """Return the distinct prompts of a context, the same at each call."""
        numbers = random.Random(f"{self._seed} {context}")
        return [[numbers.randrange(2, self._vocabulary) for _ in range(context)] for _ in range(count)]

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int, mode: str) -> CrowdReport:
        """Send all prompts at once.

        Raises:
            TimeoutError: the time of the program is over.
        """
        bodies = tuple(
            {
                "model": "m", "prompt": list(prompt), "max_tokens": tokens, "temperature": 1, "seed": number, "ignore_eos": True,
                "stream": True, "stream_options": {"include_usage": True},
            } | MODES[mode]
            for number, prompt in enumerate(prompts)
        )  # fmt: skip
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(self._bounded(Crowd(url=self.server.url, bodies=bodies)))

    async def _bounded(self, crowd: Crowd) -> CrowdReport:
        return await asyncio.wait_for(ask(crowd), max(0.1, self._clock.left))

    def prefill(self, context: int, distinct: int, mode: str) -> dict[str, Any]:
        """Read the prompts of a context, so that they are in the prefix cache."""
        alone, *others = self.prompts(context, distinct)
        first = self.ask([alone], 1, mode).endings[0].answered().first_token_seconds
        began = time.perf_counter()
        if others:
            for ending in self.ask(others, 1, mode).endings:
                ending.answered()
        together = time.perf_counter() - began
        return {
            "context": context, "mode": mode, "first_token_s": first, "prompt_tok_s": context / first,
            "others": len(others), "others_tok_s": len(others) * context / together if others else None,
        }  # fmt: skip

    def decode(self, context: int, distinct: int, streams: int, tokens: int, mode: str) -> dict[str, Any]:
        """Let streams answer cached prompts, all at once."""
        known = self.prompts(context, distinct)
        report = self.ask([known[i % distinct] for i in range(streams)], tokens, mode)
        timings = [ending.answered() for ending in report.endings]
        opened, closed = max(one.first for one in timings), min(one.ended for one in timings)
        gaps = gap_percentiles(timings)
        return {
            "context": context, "mode": mode, "streams": streams, "distinct": min(streams, distinct), "tokens": tokens,
            "decode_tok_s": decode_rate_of_all(timings), "all_decode_s": max(0.0, closed - opened),
            "gap_p50_ms": gaps and 1e3 * gaps[0], "gap_p99_ms": gaps and 1e3 * gaps[1],
            "first_token_s": max(one.first_token_seconds for one in timings),
            "cached_tokens": min(one.cached_tokens or 0 for one in timings),
            "client_load": report.cpu_seconds / report.seconds,
        }  # fmt: skip


@contextmanager
def started(
    folder: Path, flags: Sequence[str], log: Path, clock: Clock, vocabulary: int
) -> Iterator[tuple[Bench, float]]:
    """Start a server of random weights, and wait until it is ready; yields it with the seconds that the start took.

    Raises:
        BenchError: it did not get ready in time.
    """
    os.environ.update(environment())
    command = shlex.join([
        sys.executable, "-P", "-c", _SERVE, "serve", str(folder), "--load-format", "dummy", "--port", "{port}",
        "--served-model-name", "m", "--ledger", "none", *flags,
    ])  # fmt: skip
    began = time.monotonic()
    server = LocalServer("dsa", command, log, None)
    try:
        with httpx.Client(base_url=server.url, timeout=10.0, trust_env=False) as client:
            while not _ready(client):
                server.check()
                if time.monotonic() - began > READY_SECONDS or not clock.allows():
                    raise BenchError(f"the server was not ready in time; see {log.name}")
                time.sleep(0.1)
        yield Bench(server, vocabulary, clock, folder.name), time.monotonic() - began
    finally:
        server.stop()


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def measure(
    bench: Bench,
    asked: argparse.Namespace,
    modes: Sequence[str],
    clock: Clock,
    note: Callable[[str, Any], None],
) -> None:
    """Measure every case of a server. `note` takes (part, row) after each."""
    for context, distinct in zip(asked.contexts, asked.distinct, strict=True):
        for mode in modes:
            decode = partial(bench.decode, context, distinct, tokens=asked.tokens, mode=mode)
            cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [
                ("prefill", partial(bench.prefill, context, distinct, mode)),
                *(("decode", partial(decode, streams=streams)) for streams in asked.streams),
            ]
            for part, case in cases:
                name = f"{part} {mode} {context}"
                if not clock.allows():
                    note("left_out", f"{name}: no time")
                    break
                try:
                    note(part, case())
                except TimeoutError:
                    note("left_out", f"{name}: it did not end in time")
                    break
                except BenchError as error:
                    note("left_out", f"{name}: {error}")
                    bench.server.check()


def run(asked: argparse.Namespace) -> dict[str, Any]:
    """Measure all variants; write the file after each case."""
    clock = Clock(asked.seconds)
    found: dict[str, Any] = {
        "machine": describe(), "device": _device(), "command": _command(asked), "layers": asked.layers,
        "start": [], "prefill": [], "decode": [], "left_out": [],
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        (asked.out / "latent_http.json").write_text(json.dumps(found, indent=1) + "\n")

    for variant in asked.only:
        changes, flags = VARIANTS[variant]
        raw = config(asked.layers, quick=asked.quick, **changes)

        def note(part: str, row: Any, variant: str = variant) -> None:
            found[part].append({"variant": variant} | (row if isinstance(row, dict) else {"why": row}))
            print(f"{clock.left:6.1f} s left: {variant} {part} {row}", flush=True)
            write()

        if not clock.allows():
            note("left_out", "no time")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / variant
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(raw))
            own = [*flags, "--max-running", str(max(asked.streams)), *asked.flags]
            log = asked.out / f"serve-{variant}.log"
            try:
                with started(folder, own, log, clock, raw["vocab_size"]) as (bench, seconds):
                    note("start", {"seconds": seconds})
                    modes = tuple(MODES) if variant in asked.dense else ("sparse",)
                    measure(bench, asked, modes, clock, note)
            except BenchError as error:
                note("left_out", str(error))
    write()
    return found


def _command(asked: argparse.Namespace) -> str:
    """What was asked, without the folder."""
    numbers = [
        f"--{name} {','.join(map(str, getattr(asked, name)))}"
        for name in ("contexts", "distinct", "streams", "only")
    ]
    return " ".join([*numbers, f"--seconds {asked.seconds:g}", *asked.flags])


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    own, _, flags = " ".join(map(shlex.quote, arguments)).partition(" -- ")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.latent_http",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", default=",".join(VARIANTS))
    parser.add_argument("--contexts", default="8192,131072")
    parser.add_argument("--distinct", default="16,2", help="different prompts of each context")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--dense", default="base", help="variants that are also measured dense")
    parser.add_argument("--tokens", type=int, default=160, help="of each answer")
    parser.add_argument("--seconds", type=float, default=280.0, help="of the whole program")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that the program works")
    asked = parser.parse_args(shlex.split(own))
    for name in ("contexts", "distinct", "streams"):
        try:
            setattr(asked, name, [int(value) for value in getattr(asked, name).split(",")])
        except ValueError:
            parser.error(f"--{name} is {getattr(asked, name)!r}; expected numbers such as 1,16")
        if min(getattr(asked, name)) < 1:
            parser.error(f"--{name} must be numbers above 0")
    if len(asked.contexts) != len(asked.distinct):
        parser.error("--distinct needs as many numbers as --contexts")
    for name in ("only", "dense"):
        setattr(asked, name, getattr(asked, name).split(","))
        if unknown := set(getattr(asked, name)) - VARIANTS.keys():
            parser.error(f"--{name} knows {', '.join(VARIANTS)}; not {', '.join(sorted(unknown))}")
    asked.flags = shlex.split(flags)
    return asked


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    found = run(parse(sys.argv[1:] if arguments is None else arguments))
    show({name: rows for name, rows in found.items() if isinstance(rows, list)})


if __name__ == "__main__":
    main()
