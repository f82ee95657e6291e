"""A long time of everything that clients and machines do to a server, and what must be as before at its end.

`python -m tests.e2e.soak --minutes 20` starts `dsa serve` with the default model. Clients send short and long prompts,
streamed or not, with several choices or deadlines; they hang up, read slowly, send nonsense, or half a request. Meanwhile the
engine is killed five times and stopped twice (SIGSTOP). It is left alone in the first and the last third, so that what
its memory does can be seen. At the end the server has to have:

- given each request exactly one end: a whole answer, or one terminal event of a stream
- memory (RssAnon, of server and engine) that does not grow, apart from the first minutes of a life
- as many pages, asyncio tasks, descriptors and threads as after two requests of each kind

It prints progress and a table; with `--out` it writes soak.json and soak.png. The exit status is 1 if something was not kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil

from tests.e2e.serving import Resources, Server
from tests.e2e.soak_clients import Clients
from tests.e2e.wire import quantile

SAMPLE_SECONDS = 2.0
WARM_PART = 0.3
"""Of a life's time, that is not counted: memory grows while caches fill."""
_POOL_THREADS = min(32, (os.cpu_count() or 1) + 4)  # of asyncio's default executor
FLAT_MIB = 0.5
"""A process is flat if it grows less than so many MiB a minute, by the median of all slopes (Theil and Sen)."""


class Sample(NamedTuple):
    """What the processes hold at one moment; -1: the engine is not there."""

    at: float  # seconds since the beginning
    server_mib: float  # RssAnon
    engine_mib: float
    engine_pid: int
    server_files: int
    engine_files: int
    threads: int  # of the server
    pages: float
    requests: int  # ended so far


class Soak:
    """One run against one server."""

    def __init__(self, server: Server, options: argparse.Namespace) -> None:
        self.server = server
        self.options = options
        self.seconds = 60.0 * options.minutes
        self.clients = Clients(server.url, options.seed)
        self.samples: list[Sample] = []
        self.faults: list[tuple[float, str]] = []
        self.away: list[float] = []  # seconds from a fault until the server was ready again
        self.begun = 0.0

    async def run(self) -> tuple[Resources, Resources]:
        """Returns the resources before and after."""
        tally = self.clients.tally
        await self.clients.each()
        before = await asyncio.to_thread(self.server.resources)
        while before.requests or before.pages_used:  # some clients have left, and their work is to end first
            before = await asyncio.to_thread(self.server.resources)
        self.begun = time.monotonic()
        sampler = asyncio.create_task(self._sample())
        clients = [asyncio.create_task(self.clients.run()) for _ in range(self.options.clients)]
        await self._faults()
        await asyncio.sleep(max(self.begun + self.seconds - time.monotonic(), 0))
        self.clients.over = True
        await asyncio.gather(*clients)
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)
        print(f"{tally.requests} requests have ended; waiting until all is free", flush=True)
        after = before
        for _ in range(60):
            after = await asyncio.to_thread(self.server.resources)
            if not grown(before, after):
                break
            await asyncio.sleep(1)
        return before, after

    async def _faults(self) -> None:
        """Kill and stop the engine in the middle third, each time when it is ready."""
        kinds = ["kill"] * self.options.kills
        for place in range(self.options.stops):
            kinds.insert((place + 1) * len(kinds) // (self.options.stops + 1), "stop")
        for place, kind in enumerate(kinds):
            at = self.seconds * (1 + (place / len(kinds))) / 3
            await asyncio.sleep(max(self.begun + at - time.monotonic(), 0))
            engine = self.server.engine
            began = time.monotonic()
            self.faults.append((began - self.begun, kind))
            (engine.kill if kind == "kill" else engine.suspend)()
            await asyncio.to_thread(self._replaced, engine)
            self.away.append(time.monotonic() - began)
            print(f"{self._now()} {kind} of the engine; ready again after {self.away[-1]:.1f} s", flush=True)

    def _replaced(self, engine: psutil.Process) -> None:
        """Wait until another engine is ready."""
        while True:
            with suppress(ValueError, psutil.Error, httpx.HTTPError):
                if self.server.engine.pid != engine.pid and self.server.ready:
                    return
            time.sleep(0.3)

    async def _sample(self) -> None:
        told = 0.0
        process = psutil.Process(self.server.process.pid)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=30) as http:
            while True:
                pages = -1.0
                with suppress(httpx.HTTPError):
                    for line in (await http.get("/metrics")).text.splitlines():
                        if line.startswith('dsa_kv_pages{state="used"}'):
                            pages = float(line.split()[-1])
                engine = None
                with suppress(ValueError, psutil.Error):
                    engine = self.server.engine
                sample = Sample(
                    time.monotonic() - self.begun, anonymous_mib(process.pid),
                    -1.0 if engine is None else anonymous_mib(engine.pid), -1 if engine is None else engine.pid,
                    process.num_fds(), -1 if engine is None else files(engine), process.num_threads(), pages,
                    self.clients.tally.requests,
                )  # fmt: skip
                self.samples.append(sample)
                if sample.at - told >= 30:
                    told = sample.at
                    print(
                        f"{self._now()} {sample.requests} requests, {len(self.clients.tally.wrong)} wrong; RssAnon: server "
                        f"{sample.server_mib:.1f} MiB, engine {sample.engine_mib:.1f} MiB; {sample.server_files} "
                        f"descriptors, {sample.pages:.0f} pages",
                        flush=True,
                    )
                await asyncio.sleep(SAMPLE_SECONDS)

    def _now(self) -> str:
        past = time.monotonic() - self.begun
        return f"{int(past // 60):2d}:{int(past % 60):02d}"


def anonymous_mib(pid: int) -> float:
    """RssAnon of a process, in MiB; -1: there is no such process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return -1.0


def files(process: psutil.Process) -> int:
    """Open descriptors of a process; -1: it has just ended."""
    with suppress(psutil.Error):
        return process.num_fds()
    return -1


def slope(points: list[tuple[float, float]]) -> float:
    """The median of the slopes of all pairs of points (Theil, 1950; Sen, 1968), by the minute; points have seconds."""
    slopes = [
        60 * (b - a) / (then - now) for i, (now, a) in enumerate(points) for then, b in points[i + 1 :] if then > now
    ]  # fmt: skip
    return quantile(slopes, 0.5)


def counted(resources: Resources) -> list[float]:
    """How many of each."""
    return [float(len(one)) if isinstance(one, list) else float(one) for one in resources]


def grown(before: Resources, after: Resources) -> list[str]:
    """The names of the resources of which there are more than before.

    asyncio's pool of the server starts threads when work comes while all are busy, and never ends them: of these there may be
    as many more as the pool has. There are more faults in a run than that, so a thread lost with each would be seen.
    """
    pairs = zip(Resources._fields, counted(before), counted(after), strict=True)
    return [
        name for name, was, now in pairs if now > was + (_POOL_THREADS if name == "server_threads" else 0)
    ]


class Life(NamedTuple):
    """One process's memory after its warm-up."""

    name: str
    seconds: float  # of the whole life
    first: float  # MiB, medians of the first and the last tenth
    last: float
    slope: float  # MiB a minute


def lives(samples: list[Sample], shortest: float) -> list[Life]:
    """The server's life, and those of the engines that lived at least `shortest` seconds."""
    series = {"server": [(one.at, one.server_mib) for one in samples]}
    for one in samples:
        if one.engine_mib > 0:
            series.setdefault(f"engine {one.engine_pid}", []).append((one.at, one.engine_mib))
    found = []
    for name, points in series.items():
        seconds = points[-1][0] - points[0][0]
        warm = [point for point in points if point[0] >= points[0][0] + WARM_PART * seconds]
        if seconds < shortest or len(warm) < 10:
            continue
        tenth = max(len(warm) // 10, 1)
        first, last = ([mib for _, mib in part] for part in (warm[:tenth], warm[-tenth:]))
        found.append(Life(name, seconds, quantile(first, 0.5), quantile(last, 0.5), slope(warm)))
    return found


def report(soak: Soak, before: Resources, after: Resources) -> tuple[list[str], bool]:
    """The table's lines, and whether all was kept."""
    tally = soak.clients.tally
    rows = [
        ("requests", f"{tally.requests}: {dict(sorted(tally.ends.items()))}", True),
        ("without exactly one end", f"{len(tally.wrong)} {tally.wrong[:3] or ''}", not tally.wrong),
        (
            f"{len(soak.faults)} faults",
            f"ready again after at most {max(soak.away, default=0):.1f} s",
            all(seconds < 60 for seconds in soak.away),
        ),
    ]
    # Of short lives a slope says nothing; of the engine's long ones the last is judged, and the first shows the beginning.
    found = lives(soak.samples, soak.seconds / 5)
    rows += [
        (
            f"RssAnon of {life.name}, {life.seconds / 60:.1f} min",
            f"{life.first:.1f} -> {life.last:.1f} MiB, {life.slope:+.2f} MiB a minute",
            soak.options.minutes < 10 or life not in (found[0], found[-1]) or life.slope < FLAT_MIB,
        )
        for life in found
    ]
    more = grown(before, after)
    for name, was, now in zip(Resources._fields, counted(before), counted(after), strict=True):
        rows.append((name.replace("_", " "), f"{was:g} -> {now:g}", name not in more))
    gaps = tally.gaps
    rows.append(
        ("gaps in streams", f"p50 {quantile(gaps, 0.5):.2f} s, p99 {quantile(gaps, 0.99):.2f} s", True)
    )
    lines = [f"| {what} | {told} | {'kept' if kept else 'NOT KEPT'} |" for what, told, kept in rows]
    return lines, all(kept for _, _, kept in rows)


def draw(soak: Soak, path: Path) -> None:
    """Memory, descriptors and pages over time, with the faults."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    minutes = [one.at / 60 for one in soak.samples]
    there = [one for one in soak.samples if one.engine_mib > 0]
    figure, axes = plt.subplots(4, 1, figsize=(9, 9), layout="constrained", sharex=True)
    axes[0].plot(minutes, [one.server_mib for one in soak.samples])
    axes[0].set_ylabel("server RssAnon, MiB")
    axes[1].plot([one.at / 60 for one in there], [one.engine_mib for one in there], ".", markersize=2)
    axes[1].set_ylabel("engine RssAnon, MiB")
    axes[2].plot(minutes, [one.server_files for one in soak.samples], label="server")
    axes[2].plot([one.at / 60 for one in there], [one.engine_files for one in there], label="engine")
    axes[2].set_ylabel("descriptors")
    axes[2].legend(loc="upper right")
    known = [one for one in soak.samples if one.pages >= 0]
    axes[3].plot([one.at / 60 for one in known], [one.pages for one in known])
    axes[3].set_ylabel("pages in use")
    axes[3].set_xlabel("minutes")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        for at, kind in soak.faults:
            axis.axvline(at / 60, color="tab:red" if kind == "kill" else "tab:orange", linewidth=0.8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Run, print, and say whether all was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="(%(default)g)")
    parser.add_argument("--clients", type=int, default=10, help="at once (%(default)d)")
    parser.add_argument("--kills", type=int, default=5, help="of the engine (%(default)d)")
    parser.add_argument(
        "--stops", type=int, default=2, help="of the engine, until it is replaced (%(default)d)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for soak.json and soak.png")
    options = parser.parse_args()
    # A small cache, which is full when the engine is warm: else its memory grows as pages are first touched.
    server = Server("--max-queue", "32", "--max-model-len", "2048", "--kv-cache-memory", "128MiB")
    try:
        server.wait_ready()
        soak = Soak(server, options)
        before, after = asyncio.run(soak.run())
        lines, kept = report(soak, before, after)
        if "Traceback" in server.errors:
            lines.append("| the server's log | has a traceback | NOT KEPT |")
            kept = False
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "server.log").write_text(server.errors)
            found = {
                "samples": soak.samples,
                "faults": soak.faults,
                "away": soak.away,
                "ends": soak.clients.tally.ends,
            }
            (options.out / "soak.json").write_text(json.dumps(found))
            draw(soak, options.out / "soak.png")
    finally:
        server.close()
    print(f"\n| {options.minutes:g} minutes | | |\n|---|---|---|", *lines, sep="\n")
    sys.exit(0 if kept else 1)


if __name__ == "__main__":
    main()
