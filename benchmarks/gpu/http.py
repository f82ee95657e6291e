"""The default model over HTTP on one GPU: a real `dsa serve`, real sockets, and clients in processes of their own.

    python -m benchmarks.gpu.http WEIGHTS [--overlay FILE] [--device cuda] [--only start,decode,streams,prompts,abort,kill]
        [--streams 8,64,256] [--rounds 3] [--out DIR] [-- FLAGS OF dsa serve]

WEIGHTS is a GGUF file or a folder. Sparse at the overlay's own number of tokens ("sparse") beside dense, in turns. Greedy;
prompts are windows of this project's own pages, each with a head of its own, so that no prefix is cached. Medians of rounds.

- start: from the start of the command to the first `200` of /health/ready.
- decode: one stream at several contexts. streams: many at once (1,024 tokens of context): tokens a second while all
  decode, gaps between a stream's events (all of them, and those while all decode), mean time to first token.
- prompts: one prompt at a time, time to the first token.
- abort: clients of several streams hang up while another stream goes on; how long until their pages are free, and how many
  tokens the other stream got meanwhile (one a step).
- kill: `kill -9` of the engine under streams; each must get one terminal event, and the engine must come back.

`client load` is the share of a core that the busiest client used; near 1 the client would be the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from lab.bench.crowd import Crowd, CrowdProcess, ask, environment
from lab.bench.machine import children, cpu_seconds, describe
from lab.bench.servers import LocalServer
from lab.bench.timing import Timing, decode_rate_of_all, gap_percentiles, output_rate
from server.text.loading import load_tokenizer
from server.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
MODES: dict[str, dict[str, Any]] = {"sparse": {}, "dense": {"dsa": {"top_k": "dense"}}}
"""Name -> fields of a request's body."""
CONTEXTS = (128, 2048, 7168)
PROMPTS = (512, 2048, 7168)
PARTS = "start decode streams prompts abort kill".split()
CLIENT_START = 2.5
"""Seconds that client processes get to start and connect before they all send at once."""
STREAMS_A_CLIENT = 64
READY_SECONDS = 300.0
RUN_SECONDS = 60.0
"""All streams of a crowd must run at once within so many seconds."""
_SERVE = "from server.cli.main import main; main()"


class Prompts:
    """Windows of this project's pages. Each begins with tokens of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        text = "\n".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
        tokens = tokenizer.encode(text)
        self._tokens = tokens * (1 + 40_000 // len(tokens))
        self._random = random.Random(time.time_ns())

    def take(self, length: int) -> list[int]:
        """Return the next prompt of `length` tokens."""
        start = self._random.randrange(len(self._tokens) - length)
        head = self._random.choices(self._tokens, k=min(8, length))
        return head + self._tokens[start : start + length - len(head)]


class Bench:
    """One running server, and its prompts."""

    def __init__(self, server: LocalServer, model: str, prompts: Prompts) -> None:
        self.server = server
        self.model = model
        self.prompts = prompts
        self._http = httpx.Client(base_url=server.url, timeout=60.0, trust_env=False)

    def body(self, context: int, tokens: int, mode: str) -> dict[str, Any]:
        """Make a request's body."""
        return {
            "model": self.model, "prompt": self.prompts.take(context), "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
        } | MODES[mode]  # fmt: skip

    def crowd(self, bodies: Sequence[dict[str, Any]], begin: float = 0.0) -> Crowd:
        """Make what a client asks."""
        return Crowd(url=self.server.url, bodies=tuple(bodies), begin=begin)

    def alone(self, context: int, tokens: int, mode: str) -> Timing:
        """Send one request from this process."""
        crowd = self.crowd([self.body(context, tokens, mode)])
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            report = runner.run(ask(crowd))
        return report.endings[0].answered()

    def together(self, streams: int, context: int, tokens: int, mode: str) -> dict[str, Any]:
        """Send many requests at once, from several processes."""
        begin = time.perf_counter() + CLIENT_START
        before = cpu_seconds(self.server.pid), cpu_seconds(self.engine_pid())
        clients = [
            CrowdProcess(self.crowd([self.body(context, tokens, mode) for _ in range(count)], begin))
            for count in _shares(streams)
        ]
        reports = [client.report() for client in clients]
        used = cpu_seconds(self.server.pid) - before[0], cpu_seconds(self.engine_pid()) - before[1]
        timings = [ending.answered() for report in reports for ending in report.endings]
        total = sum(timing.completion_tokens for timing in timings)
        opened = max(timing.first for timing in timings)
        closed = min(timing.ended for timing in timings)
        steady = [
            msgspec.structs.replace(
                timing, arrivals=tuple(a for a in timing.arrivals if opened <= a <= closed)
            )
            for timing in timings
        ]
        gaps, calm = gap_percentiles(timings), gap_percentiles(steady)
        firsts = [timing.first_token_seconds for timing in timings]
        return {
            "decode_tok_s": decode_rate_of_all(timings),
            "output_tok_s": output_rate(timings),
            "first_token_s": statistics.mean(firsts),
            "last_first_token_s": max(firsts),
            "gap_p50_s": gaps and gaps[0],
            "gap_p99_s": gaps and gaps[1],
            "steady_gap_p50_s": calm and calm[0],
            "steady_gap_p99_s": calm and calm[1],
            "server_cpu_s_a_token": used[0] / total,
            "engine_cpu_s_a_token": used[1] / total,
            "client_load": max(report.cpu_seconds / report.seconds for report in reports),
            "sent_within_s": max(timing.sent for timing in timings) - min(timing.sent for timing in timings),
        }

    def metric(self, name: str) -> float:
        """Read one sample of /metrics, by its name with labels."""
        for line in self._http.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        raise RuntimeError(f"/metrics has no {name}")

    def ready(self) -> bool:
        """Whether the server takes requests."""
        try:
            return self._http.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def engine_pid(self) -> int:
        """The id of the engine's process."""
        for child in children(self.server.pid):
            if b"engine.step.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        raise RuntimeError("the server has no engine process")


def _shares(streams: int) -> list[int]:
    clients = -(-streams // STREAMS_A_CLIENT)
    return [streams // clients + (i < streams % clients) for i in range(clients)]


@contextmanager
def started(arguments: argparse.Namespace, out: Path) -> Iterator[tuple[Bench, float]]:
    """Start the server, and wait until it is ready; yields it with the seconds that the start took."""
    tokenizer = load_tokenizer(Path(arguments.weights))
    os.environ.update(environment())
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            arguments.weights, "--port", "{port}", "--device", arguments.device, "--served-model-name", "m",
            "--max-queue", str(4 * max(arguments.streams)), "--ledger", f"{folder}/usage.sqlite",
        ]  # fmt: skip
        if arguments.overlay is not None:
            flags += ["--overlay", arguments.overlay]
        command = shlex.join([sys.executable, "-P", "-c", _SERVE, "serve", *flags, *arguments.flags])
        began = time.monotonic()
        server = LocalServer("dsa", command, out / "serve.log", None)
        try:
            bench = Bench(server, "m", Prompts(tokenizer))
            wait_ready(bench, began)
            yield bench, time.monotonic() - began
        finally:
            server.stop()


def wait_ready(bench: Bench, began: float) -> None:
    """Wait until the server takes requests."""
    while not bench.ready():
        bench.server.check()
        if time.monotonic() - began > READY_SECONDS:
            raise RuntimeError(f"the server was not ready within {READY_SECONDS:g} s; see {bench.server.log}")
        time.sleep(0.05)


def decode(bench: Bench, contexts: Sequence[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Measure one stream at several contexts."""
    rows = []
    for context in contexts:
        timings: dict[str, list[Timing]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                timings[mode].append(bench.alone(context, tokens, mode))
        for mode, own in timings.items():
            gaps = [gap_percentiles([timing]) or (0.0, 0.0) for timing in own]
            rates = [timing.decode_rate or 0.0 for timing in own]
            row = {
                "context": context, "mode": mode, "decode_tok_s": statistics.median(rates), "least": min(rates), "most": max(rates),
                "gap_p50_s": statistics.median(p50 for p50, _ in gaps),
                "gap_p99_s": statistics.median(p99 for _, p99 in gaps),
                "first_token_s": statistics.median(timing.first_token_seconds for timing in own),
            }  # fmt: skip
            rows.append(row)
    return rows


def streams(
    bench: Bench, counts: Sequence[int], context: int, tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Measure many streams at once; each figure is the median of the rounds."""
    rows = []
    for count in counts:
        found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                found[mode].append(bench.together(count, context, tokens, mode))
        for mode, own in found.items():
            row: dict[str, Any] = {"streams": count, "mode": mode}
            for name in own[0]:
                values = [one[name] for one in own if one[name] is not None]
                row[name] = statistics.median(values) if values else None
            rows.append(row)
    return rows


def prompts(bench: Bench, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Measure single prompts."""
    rows = []
    for length in lengths:
        found: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(rounds + 2):
            for mode in MODES:
                found[mode].append(bench.alone(length, 1, mode).first_token_seconds)
        for mode, own in found.items():
            seconds = statistics.median(own)
            rows.append(
                {"prompt": length, "mode": mode, "first_token_s": seconds, "least_s": min(own), "most_s": max(own), "tok_s": length / seconds}
            )  # fmt: skip
    return rows


def abort(bench: Bench, count: int, context: int, tokens: int) -> dict[str, Any]:
    """Let the clients of `count` streams hang up while one more stream goes on."""
    used = 'dsa_kv_pages{state="used"}'
    own = -(-context // 64)
    stays = CrowdProcess(bench.crowd([bench.body(context, tokens, "sparse")]))
    leaves = CrowdProcess(bench.crowd([bench.body(context, tokens, "sparse") for _ in range(count)]))
    began = time.monotonic()
    while bench.metric("dsa_requests_running") < count + 1 or bench.metric(used) < (count + 1) * own:
        if time.monotonic() - began > RUN_SECONDS:
            raise RuntimeError("the streams did not all run at once; give them more tokens")
        time.sleep(0.01)
    time.sleep(0.3)
    held = bench.metric(used)
    scrape = time.perf_counter()
    bench.metric(used)
    scrape = time.perf_counter() - scrape
    left = time.perf_counter()
    leaves.kill()  # the kernel closes its sockets
    most = held - count * own
    while (now := bench.metric(used)) > most:
        pass
    free = time.perf_counter()
    timing = stays.report().endings[0].answered()
    return {
        "streams": count, "pages_before": held, "pages_after": now, "seconds": free - left, "a_scrape_s": scrape,
        "steps_meanwhile": sum(left < arrival <= free for arrival in timing.arrivals),
        "a_step_s": statistics.median(timing.gaps),
    }  # fmt: skip


def kill(bench: Bench, count: int, context: int, tokens: int) -> dict[str, Any]:
    """Kill the engine under `count` streams."""
    crowds = [bench.crowd([bench.body(context, tokens, "sparse") for _ in range(n)]) for n in _shares(count)]
    clients = [CrowdProcess(crowd) for crowd in crowds]
    began = time.monotonic()
    while bench.metric("dsa_requests_running") < count:
        if time.monotonic() - began > RUN_SECONDS:
            raise RuntimeError("the streams did not all run at once; give them more tokens")
        time.sleep(0.01)
    killed = time.monotonic()
    os.kill(bench.engine_pid(), signal.SIGKILL)
    endings = [ending for client in clients for ending in client.report().endings]
    told = time.monotonic() - killed
    wait_ready(bench, killed)
    back = time.monotonic() - killed
    after = bench.alone(context, 16, "sparse")
    return {
        "streams": count,
        "with_one_terminal_event": sum(ending.terminal == 1 for ending in endings),
        "with_an_error_event": sum(ending.error is not None and ending.status == 200 for ending in endings),
        "clients_ended_after_s": told,
        "ready_after_s": back,
        "tokens_after": after.completion_tokens,
        "errors": sorted({ending.error for ending in endings if ending.error}),
    }


def show(found: dict[str, Any]) -> None:
    """Print what was measured as tables."""
    console = Console(width=200)
    for name, rows in found.items():
        if isinstance(rows, list) and rows:
            table = Table(*rows[0], title=name)
            for row in rows:
                table.add_row(*map(_cell, row.values()))
            console.print(table)
        elif name != "machine":
            console.print(f"{name}: {rows}")


def _cell(value: object) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)


def parse() -> argparse.Namespace:
    """Read the command line."""
    own, _, flags = " ".join(map(shlex.quote, sys.argv[1:])).partition(" -- ")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("--overlay")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--streams", default="8,64,256")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)))
    parser.add_argument("--stream-context", type=int, default=1024, help="tokens of each prompt of `streams`")
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("."))
    parsed = parser.parse_args(shlex.split(own))
    for name in ("streams", "contexts", "prompts"):
        setattr(parsed, name, [int(value) for value in getattr(parsed, name).split(",")])
    parsed.only = parsed.only.split(",")
    if unknown := set(parsed.only) - set(PARTS):
        parser.error(f"--only knows {', '.join(PARTS)}; not {', '.join(sorted(unknown))}")
    parsed.flags = shlex.split(flags)
    return parsed


def main() -> None:
    """Measure, print, and write `http.json` after each part."""
    arguments = parse()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": describe(), "command": shlex.join(sys.argv[1:])}
    several = max(count for count in arguments.streams if count <= 64)
    with started(arguments, out) as (bench, seconds):
        found["start_s"] = seconds
        bench.alone(256, 32, "sparse")  # warm-up
        bench.alone(256, 32, "dense")
        for part in arguments.only:
            began = time.monotonic()
            if part == "decode":
                found[part] = decode(bench, arguments.contexts, arguments.tokens, arguments.rounds)
            elif part == "streams":
                found[part] = streams(
                    bench, arguments.streams, arguments.stream_context, arguments.tokens, arguments.rounds
                )
            elif part == "prompts":
                found[part] = prompts(bench, arguments.prompts, arguments.rounds)
            elif part == "abort":
                found[part] = abort(
                    bench, max(1, min(8, several - 1)), arguments.contexts[0], 16 * arguments.tokens
                )
            elif part == "kill":
                found[part] = kill(bench, several, arguments.contexts[0], 16 * arguments.tokens)
            found.setdefault("seconds", {})[part] = time.monotonic() - began
            (out / "http.json").write_text(json.dumps(found, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
