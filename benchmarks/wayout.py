"""Measures the way out: from the engine process through the server process to the clients' sockets, without a model.

    python -m benchmarks.wayout [--streams 1,8,64,256] [--rate 20000] [--tokens 256] [--chat] [--json FILE]

A real server runs before `benchmarks.wayout_engine`, which has the real loop, scheduler and messages, and makes tokens at
`--rate` over all streams (a step takes 1.4 ms at least, as on a fast GPU). `lab.bench.crowd` asks, in a process of its own.

On a machine with few cores the three processes share them. Then tok/s and gaps say little; the seconds of each process's
CPU a token still say what a core would give: `events/s of a core` is their inverse for the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.wayout_engine import STEP
from engine.config import EngineConfig
from engine.supervisor import SubprocessEngine
from lab.bench.crowd import Crowd, CrowdProcess, environment
from lab.bench.machine import children, cpu_seconds
from lab.bench.timing import decode_rate_of_all, gap_percentiles
from server.chat import choose, load_chat_format
from server.config import ServerConfig
from server.hub.models import resolve
from server.listen import bind
from server.serve import loop_factory, run
from server.text.loading import load_tokenizer

LEAST_STEP = 1.4e-3
MODEL = "none"
START_SECONDS = 100.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one number of streams. Times are seconds.

    Attributes:
        streams: how many.
        rate: what the engine offered, tokens a second.
        got: tokens a second over HTTP while all streams decode.
        server, engine, client: CPU seconds a token of each process.
        first: the mean time to the first token.
        p50, p99: of the gaps between events of one stream.
        tokens_an_event: more than 1 if the server was slower than the engine and sent tokens together.
    """

    streams: int
    rate: float
    got: float
    server: float
    engine: float
    client: float
    first: float
    p50: float
    p99: float
    tokens_an_event: float


@contextmanager
def serving(step: float, most: int) -> Iterator[tuple[str, int, int]]:
    """Run the server and the engine; yields its address and the ids of the two processes."""
    environ = environment() | {STEP: str(step)}
    command = [sys.executable, "-P", "-m", "benchmarks.wayout", "--serve", str(most)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as server,
    ):
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            match = re.match(r"ready at (\S+) ", line)
            if match is None:
                raise RuntimeError(f"the server did not start; it says {line!r}")
            yield match[1], server.pid, children(server.pid)[0]
        finally:
            server.terminate()


def serve(most: int) -> None:
    """Be the server process: what `dsa serve` does, with another engine program."""
    files = resolve()
    text = load_tokenizer(files.weights)
    name, _ = choose(files.weights, "auto")
    chat = load_chat_format(files.weights, name, text)
    config = ServerConfig(model_name=MODEL, max_queue=2 * most, ledger=str(Path.cwd() / "usage.sqlite"))
    engine = SubprocessEngine(
        EngineConfig(weights=str(files.weights), max_running=most, token_budget=8192),
        module="benchmarks.wayout_engine",
    )
    with bind("127.0.0.1", 0) as listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run(config, engine, text, chat, listener))


def bodies(streams: int, prompt: int, tokens: int, *, chat: bool) -> tuple[dict[str, Any], ...]:
    """Requests with different prompts of `prompt` tokens (for a chat: a short question)."""
    common = {
        "model": MODEL, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    draw = random.Random(streams)
    if chat:
        return tuple(
            common | {"messages": [{"role": "user", "content": f"question {draw.random()}"}]}
            for _ in range(streams)
        )
    return tuple(common | {"prompt": draw.choices(range(1000, 40_000), k=prompt)} for _ in range(streams))


def measure(streams: int, rate: float, tokens: int, prompt: int, *, chat: bool, most: int) -> Row:
    """Run one case.

    Raises:
        BenchError: a stream did not end as it should.
    """
    step = max(LEAST_STEP, streams / rate)
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with serving(step, most) as (url, server, engine):
        CrowdProcess(Crowd(url=url, path=path, bodies=bodies(2, prompt, 16, chat=chat))).report()  # warm-up
        before = cpu_seconds(server), cpu_seconds(engine)
        crowd = Crowd(url=url, path=path, bodies=bodies(streams, prompt, tokens, chat=chat))
        report = CrowdProcess(crowd).report()
        used = cpu_seconds(server) - before[0], cpu_seconds(engine) - before[1]
    timings = [ending.answered() for ending in report.endings]
    total = sum(timing.completion_tokens for timing in timings)
    events = sum(len(timing.arrivals) for timing in timings)
    p50, p99 = gap_percentiles(timings) or (0.0, 0.0)
    return Row(
        streams=streams,
        rate=streams / step,
        got=decode_rate_of_all(timings) or total / report.seconds,
        server=used[0] / total,
        engine=used[1] / total,
        client=report.cpu_seconds / total,
        first=sum(timing.first_token_seconds for timing in timings) / streams,
        p50=p50,
        p99=p99,
        tokens_an_event=total / max(events, 1),
    )


def show(rows: Sequence[Row]) -> None:
    """Print a table."""
    table = Table(
        "streams", "offered tok/s", "got tok/s", "server us/token", "events/s of a core", "engine us/token",
        "client us/token", "first token s", "gap p50 ms", "p99 ms", "tokens an event",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            str(row.streams), f"{row.rate:,.0f}", f"{row.got:,.0f}", f"{row.server * 1e6:.1f}", f"{1 / row.server:,.0f}",
            f"{row.engine * 1e6:.1f}", f"{row.client * 1e6:.1f}", f"{row.first:.3f}", f"{row.p50 * 1e3:.2f}",
            f"{row.p99 * 1e3:.2f}", f"{row.tokens_an_event:.2f}",
        )  # fmt: skip
    Console(width=150).print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", default="1,8,64,256")
    parser.add_argument("--rate", type=float, default=20_000.0, help="tokens a second that the engine offers")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--chat", action="store_true", help="ask for chat answers")
    parser.add_argument("--json", type=Path, help="write the rows to this file, too")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args.serve)
        return
    counts = [int(count) for count in args.streams.split(",")]
    rows = [
        measure(count, args.rate, args.tokens, args.prompt, chat=args.chat, most=max(64, count))
        for count in counts
    ]
    show(rows)
    if args.json is not None:
        args.json.write_text(json.dumps([msgspec.to_builtins(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
