"""Runs suites: starts servers, asks all servers in turn, and saves the results after every round."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lab.bench.ask import Asker
from lab.bench.endpoint import Endpoint, NotYetError, connect
from lab.bench.errors import BenchError
from lab.bench.inprocess import NAME as IN_PROCESS
from lab.bench.inprocess import Overhead, drive
from lab.bench.machine import describe
from lab.bench.prompts import Words
from lab.bench.report import show
from lab.bench.results import BenchResults, Sample, Server
from lab.bench.servers import LocalServer, all_stopped, leave, others_paused
from lab.bench.suites import SampleValues, Suite
from lab.bench.timing import Timing
from server.hub.models import ModelFiles
from server.hub.stages import Stages
from server.text.loading import load_tokenizer

QUIET_SECONDS = 15.0
"""The time between two lines of progress, if the output is not a terminal."""
_POLL_SECONDS = 0.5
_WARM_UP = (64, 8)
"""Tokens of prompt and answer of the first request, which is not measured."""

Contender = tuple[Asker, LocalServer | None]
"""A server, and its process if it was started here."""


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure.

    Attributes:
        suites: what to measure, one after the other, with the same servers.
        endpoints: name -> address of a running server.
        commands: name -> command line of a server to start, with {port} in it.
        own: the name of the server that is compared with the others.
        fields: name -> more fields for the bodies of the server's requests.
        files: the model's files, for its tokenizer and for the engine in process.
        rounds: samples of each case of each server.
        cpus: cores that the started servers share; None is any.
        as_text: send prompts as text, for servers that take no token ids.
        out: the folder of results.
        start_seconds: how long a server may take to start.
        command: what the user typed.
    """

    suites: tuple[Suite, ...]
    endpoints: Mapping[str, str]
    commands: Mapping[str, str]
    own: str
    fields: Mapping[str, Mapping[str, Any]]
    files: ModelFiles
    rounds: int
    cpus: tuple[int, ...] | None
    as_text: bool
    out: Path
    start_seconds: float
    command: str


def run(plan: BenchPlan, console: Console) -> list[BenchResults]:
    """Measure, save and show; return the results.

    Raises:
        BenchError: a suite cannot be measured; the results so far are kept.
        TokenizerError: the model's tokenizer cannot be used.
    """
    try:  # matplotlib is an extra; if it is missing, say so now and not after the work
        from lab.bench.plot import draw
    except ImportError:
        raise BenchError(
            "matplotlib is not installed; the pictures need it: pip install 'dsa-serve[train]'"
        ) from None
    words = Words(load_tokenizer(plan.files.weights))
    plan.out.mkdir(parents=True, exist_ok=True)
    started: list[LocalServer] = []
    done = []
    with all_stopped(started), asyncio.Runner() as runner:
        if plan.cpus is not None:
            leave(plan.cpus)
        for suite in plan.suites:
            results = runner.run(_measure(plan, suite, words, started))
            done.append(results)
            path, picture = results.save(plan.out), draw(results, plan.out)
            show(console, results)
            console.print(f"written: {path} and {picture}", highlight=False, soft_wrap=True)
    return done


async def _measure(plan: BenchPlan, suite: Suite, words: Words, started: list[LocalServer]) -> BenchResults:
    """Measure one suite. The first suite starts the servers and adds them to `started`."""
    machine, began = describe(), time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with Stages(quiet_seconds=QUIET_SECONDS) as stages:
            contenders: list[Contender] = []
            for name, url in plan.endpoints.items():
                endpoint = await stack.enter_async_context(
                    connect(name, url, dict(plan.fields.get(name, {})))
                )
                contenders.append((_asker(plan, endpoint, words), None))
            fresh = not started
            for i, (name, command) in enumerate(plan.commands.items()):
                if fresh:
                    started.append(LocalServer(name, command, plan.out / f"{name}.log", plan.cpus))
                local = started[i]
                endpoint = await stack.enter_async_context(
                    connect(name, local.url, dict(plan.fields.get(name, {})))
                )
                contenders.append((_asker(plan, endpoint, words), local))
                await _warm_up(contenders[-1][0], local, plan.start_seconds, stages)
            for ask, _ in contenders[: len(plan.endpoints)]:
                await _warm_up(ask, None, 0, stages)
            results = _empty(plan, suite, machine, contenders)
            await _turns(plan, suite, contenders, results, stages)
    results.seconds = time.monotonic() - began
    return results


def _asker(plan: BenchPlan, endpoint: Endpoint, words: Words) -> Asker:
    return Asker(endpoint, words, as_text=plan.as_text, run=uuid.uuid4().hex)


async def _warm_up(ask: Asker, local: LocalServer | None, seconds: float, stages: Stages) -> None:
    """Wait until a server answers, and send it one request.

    Raises:
        BenchError: the server does not answer within `seconds`, or ended.
    """
    name, began = ask.endpoint.name, time.monotonic()
    while True:
        stages(f"waiting for {name}", 0, 0)
        if local is not None:
            local.check()
        try:
            await ask.endpoint.greet()
            await ask.one(*_WARM_UP, body="warm-up", head=("warm-up", began))
        except NotYetError as reason:
            if time.monotonic() - began >= seconds:
                waited = f" after {seconds:g} seconds" if seconds else ""
                raise BenchError(f"{name} cannot be measured{waited}: {reason}") from None
            await asyncio.sleep(_POLL_SECONDS)
        else:
            return


def _empty(
    plan: BenchPlan, suite: Suite, machine: dict[str, Any], contenders: Sequence[Contender]
) -> BenchResults:
    cpus = None if plan.cpus is None else list(plan.cpus)
    servers = [
        Server(
            name=ask.endpoint.name,
            url=ask.endpoint.url,
            command=None if local is None else local.command,
            cpus=None if local is None else cpus,
            about=ask.endpoint.about,
            fields=dict(plan.fields.get(ask.endpoint.name, {})),
        )
        for ask, local in contenders
    ]
    if isinstance(suite, Overhead):
        servers = [server for server in servers if server.name == plan.own]
        servers.append(Server(name=IN_PROCESS, url=None, command=None, cpus=cpus))
    settings = vars(suite) | {
        "rounds": plan.rounds, "model": plan.files.name, "as_text": plan.as_text,
    }  # fmt: skip
    return BenchResults(
        suite=suite.name, title=suite.title, axis=suite.axis, metrics=list(suite.metrics), own=plan.own,
        command=plan.command, started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), settings=settings,
        machine=machine, servers=servers,
    )  # fmt: skip


async def _turns(
    plan: BenchPlan, suite: Suite, contenders: Sequence[Contender], results: BenchResults, stages: Stages
) -> None:
    """Measure every case in rounds. In each round every server is measured, and another one is the first."""
    ours = [local for _, local in contenders if local is not None]
    names = [server.name for server in results.servers]
    asked = {ask.endpoint.name: (ask, local) for ask, local in contenders}
    total, done = len(suite.cases) * plan.rounds * len(names), 0
    for case in suite.cases:
        for turn in range(plan.rounds):
            at = turn % len(names)
            for name in names[at:] + names[:at]:
                stages(f"{suite.name}, {case:,} {suite.axis.partition(' ')[0]}: {name}", done, total)
                done += 1
                timings: list[Timing] = []
                peak: int | None = None
                if isinstance(suite, Overhead) and name == IN_PROCESS:
                    with others_paused(ours, None):
                        values, peak = await drive(suite.command(plan.files, case), plan.cpus)
                else:
                    ask, local = asked[name]
                    with others_paused(ours, local):
                        values, timings = await _sample(suite, ask, local, case, turn)
                    zero = min(timing.sent for timing in timings)
                    timings = [timing.since(zero) for timing in timings]
                    peak = None if local is None else local.peak_memory()
                sample = Sample(
                    server=name, case=case, turn=turn, values=values, requests=timings, peak_memory_bytes=peak
                )
                results.samples.append(sample)
                results.summarise()
                results.save(plan.out)  # a run that is cut off keeps what it has
    for server in results.servers:
        local = asked[server.name][1] if server.name in asked else None
        if local is not None:
            server.peak_memory_bytes = local.peak_memory()
        said = suite.remarks(results.figures, server.name)
        results.remarks += [f"{server.name}: {remark}" for remark in said]


async def _sample(
    suite: Suite, ask: Asker, local: LocalServer | None, case: int, turn: int
) -> tuple[SampleValues, list[Timing]]:
    try:
        return await suite.sample(ask, case, turn)
    except (BenchError, NotYetError) as error:
        if local is not None:
            local.check()
        raise BenchError(f"{suite.name} at {case:,}: {error}") from None
