"""Offers a live server four times what it can do, and shows what those feel who are let in and those who are not.

`python -m tests.e2e.overload` starts `dsa serve` with the default model and a bound on the time to a first token, measures its capacity with
as many clients as it computes at once, and then sends requests at 4 times that rate for 3 minutes, at times that do not
depend on the answers (Poisson). Before, a crowd comes at once, whose clients come back when `Retry-After` says so.
It writes a table, and with `--out` a JSON file and a plot. The exit status is 1 if a line of the table is not kept.

The server's bound is `--max-queue-seconds`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.serving import MODEL, Server
from tests.e2e.wire import Answer, ask, encoded, quantile

PROMPT, OUTPUT = 64, 8
PROBE_SECONDS = 0.25
REFUSED_SECONDS = 0.05


@dataclass
class Line:
    """One promise, and what was measured."""

    what: str
    measured: str
    promise: str
    kept: bool


def request(chance: random.Random) -> bytes:
    """A prompt that no other request shares a prefix with."""
    return encoded(
        "/v1/completions",
        {
            "model": MODEL, "prompt": [chance.randrange(1000, 20000) for _ in range(PROMPT)], "max_tokens": OUTPUT,
            "ignore_eos": True, "stream": True,
        },
    )  # fmt: skip


class Overload:
    """The measurement of one server."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.chance = random.Random(seed)
        self.probes: list[float] = []

    async def alone(self, count: int) -> list[float]:
        """Times to the first token of requests one after another."""
        return [self.first(await self.ask()) for _ in range(count)]

    async def capacity(self, clients: int, seconds: float) -> float:
        """Requests a second that are served while so many clients ask one after another; the first quarter is not counted."""
        ends: list[float] = []
        over = time.monotonic() + seconds

        async def client() -> None:
            while time.monotonic() < over:
                answer = await self.ask()
                if answer.status == 200:
                    ends.append(time.monotonic())
                else:  # a slow machine lets in fewer
                    await asyncio.sleep(0.1)

        await asyncio.gather(*(client() for _ in range(clients)))
        counted = [end for end in ends if over - 0.75 * seconds < end <= over]
        return len(counted) / (0.75 * seconds)

    async def storm(self, rate: float, seconds: float) -> list[Answer]:
        """Requests at a mean rate, whatever becomes of them."""
        begun, tasks = time.monotonic(), []
        at = begun
        while (at := at + self.chance.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(at - time.monotonic(), 0))
            tasks.append(asyncio.create_task(self.ask()))
        return list(await asyncio.gather(*tasks))

    async def crowd(self, count: int) -> tuple[list[int], float]:
        """So many at once, who obey `Retry-After`. Returns the attempts of each, and the seconds until all are served."""
        begun = time.monotonic()

        async def client() -> int:
            attempts = 0
            while True:
                attempts += 1
                answer = await self.ask()
                if answer.status != 429:
                    return attempts
                await asyncio.sleep(float(answer.headers["retry-after"]) + self.chance.random())

        return list(await asyncio.gather(*(client() for _ in range(count)))), time.monotonic() - begun

    async def probe(self) -> None:
        """Ask whether the server is alive, again and again."""
        question = encoded("/health/live", b"", method="GET")
        while True:
            answer = await ask(self.server.url, question)
            self.probes.append(answer.seconds if answer.status == 200 and answer.seconds else float("inf"))
            await asyncio.sleep(PROBE_SECONDS)

    async def ask(self) -> Answer:
        """One request."""
        return await ask(self.server.url, request(self.chance))

    @staticmethod
    def first(answer: Answer) -> float:
        """The time to the first token."""
        return answer.events[0] if answer.events else float("inf")


async def measure(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """Run all parts; returns the figures."""
    overload = Overload(server, options.seed)
    await overload.alone(3)  # warms up
    alone = await overload.alone(20)
    print(f"alone: {1000 * quantile(alone, 0.5):.0f} ms to the first token", flush=True)
    capacity = await overload.capacity(options.clients, options.capacity_seconds)
    print(f"capacity: {capacity:.2f} requests/s of {PROMPT} + {OUTPUT} tokens", flush=True)
    # Before the storm, whose clients never come back: the server would keep places for them for a minute.
    attempts, crowd_seconds = await overload.crowd(options.crowd)
    print(f"crowd: served in {crowd_seconds:.0f} s", flush=True)
    probing = asyncio.create_task(overload.probe())
    answers = await overload.storm(options.times * capacity, options.seconds)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    print(f"storm: {len(answers)} requests in {options.seconds:.0f} s", flush=True)
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    begun = min(answer.began for answer in answers)
    return {
        "capacity": capacity,
        "bound_seconds": options.queue_seconds,
        "alone": alone,
        "offered": len(answers),
        "accepted": [(answer.began - begun, Overload.first(answer), answer.terminal) for answer in accepted],
        "refused": [
            (answer.began - begun, answer.seconds, int(answer.headers.get("retry-after", 0))) for answer in refused
        ],
        "others": [
            (answer.status, answer.lost) for answer in answers if answer.status not in (200, 429)
        ],
        "probes": overload.probes,
        "crowd": {"attempts": attempts, "seconds": crowd_seconds},
        "seconds": options.seconds,
    }  # fmt: skip


def judge(found: dict[str, Any]) -> list[Line]:
    """The promises, each with its figure."""
    alone = quantile(found["alone"], 0.5)
    first = [seconds for _, seconds, _ in found["accepted"]]
    refused = [seconds for _, seconds, _ in found["refused"]]
    bound = 2 * alone + found["bound_seconds"]
    served = len(first) / found["seconds"] / found["capacity"]
    attempts = found["crowd"]["attempts"]
    ideal = len(attempts) / found["capacity"]
    stretch = found["crowd"]["seconds"] / ideal
    mean = sum(attempts) / len(attempts)
    p99 = quantile(first, 0.99)
    return [
        Line(
            "time to first token of the accepted",
            f"p50 {quantile(first, 0.5):.2f} s, p99 {p99:.2f} s",
            f"p99 at most 2 x {alone:.2f} s alone + {found['bound_seconds']:.2f} s of queue = {bound:.2f} s",
            p99 <= bound,
        ),
        Line(
            "429",
            f"p50 {1000 * quantile(refused, 0.5):.1f} ms, p99 {1000 * quantile(refused, 0.99):.1f} ms, longest "
            f"{1000 * max(refused, default=0):.0f} ms",
            f"p99 under {1000 * REFUSED_SECONDS:.0f} ms",
            quantile(refused, 0.99) < REFUSED_SECONDS,
        ),
        Line("accepted work", f"{100 * served:.0f} % of capacity", "at least 90 %", served >= 0.9),
        Line(
            "answers other than 200 and 429, or without one end",
            str(len(found["others"]) + sum(ends != 1 for _, _, ends in found["accepted"])),
            "none",
            not found["others"] and all(ends == 1 for _, _, ends in found["accepted"]),
        ),
        Line(
            "a crowd that obeys Retry-After",
            f"{mean:.1f} attempts each, most {max(attempts)}; served in {stretch:.2f} x the time that capacity needs",
            "at most 4 attempts on average, 1.5 x the time",
            mean <= 4 and stretch <= 1.5,
        ),
        Line(
            "/health/live meanwhile",
            f"p99 {1000 * quantile(found['probes'], 0.99):.0f} ms, longest {1000 * max(found['probes']):.0f} ms",
            "p99 under 100 ms",
            quantile(found["probes"], 0.99) < 0.1,
        ),
    ]


def draw(found: dict[str, Any], path: Path) -> None:
    """Times to the first token and times of refusals, over the time of the storm."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6), layout="constrained", sharex=True)
    above.plot(
        [at for at, _, _ in found["accepted"]],
        [first for _, first, _ in found["accepted"]],
        ".",
        markersize=3,
    )
    bound = 2 * quantile(found["alone"], 0.5) + found["bound_seconds"]
    above.axhline(bound, color="tab:red", linewidth=1, label=f"2 x alone + queue's bound: {bound:.1f} s")
    above.set_ylabel("s to first token, accepted")
    below.plot(
        [at for at, _, _ in found["refused"]],
        [1000 * took for _, took, _ in found["refused"]],
        ".",
        markersize=2,
    )
    below.axhline(1000 * REFUSED_SECONDS, color="tab:red", linewidth=1, label="50 ms")
    below.set_ylabel("ms to a 429")
    below.set_yscale("log")
    below.set_xlabel("s")
    for axis in (above, below):
        axis.legend(loc="upper right")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure, print, and say whether all was kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180.0, help="of the storm (%(default)g)")
    parser.add_argument("--times", type=float, default=4.0, help="of the capacity (%(default)g)")
    parser.add_argument("--clients", type=int, default=8, help="that measure the capacity (%(default)d)")
    parser.add_argument("--capacity-seconds", type=float, default=40.0, help="(%(default)g)")
    parser.add_argument(
        "--queue-seconds", type=float, default=3.0, help="--max-queue-seconds of the server (%(default)g)"
    )
    parser.add_argument("--crowd", type=int, default=60, help="clients that come at once (%(default)d)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a folder for overload.json and overload.png")
    options = parser.parse_args()
    server = Server("--max-queue-seconds", str(options.queue_seconds))
    try:
        server.wait_ready()
        found = asyncio.run(measure(options, server))
    finally:
        server.close()
    lines = judge(found)
    print(
        f"\n| {options.times:g} x capacity for {options.seconds:g} s | measured | promised | |\n|---|---|---|---|"
    )
    for line in lines:
        print(f"| {line.what} | {line.measured} | {line.promise} | {'kept' if line.kept else 'NOT KEPT'} |")
    after = [retry for _, _, retry in found["refused"]]
    print(
        f"\nRetry-After without anybody who comes back: p50 {quantile(after, 0.5)} s, longest {max(after, default=0)} s"
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "overload.json").write_text(json.dumps(found))
        draw(found, options.out / "overload.png")
    sys.exit(0 if all(line.kept for line in lines) else 1)


if __name__ == "__main__":
    main()
