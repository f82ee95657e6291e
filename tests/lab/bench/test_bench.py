"""`dsa bench`: times and statistics made by hand, a fake server with chosen times and faults, and the real command."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab.bench.__main__ import app
from lab.bench.ask import Asker
from lab.bench.endpoint import NotYetError, connect
from lab.bench.errors import BenchError
from lab.bench.prompts import HEAD, Words
from lab.bench.results import load
from lab.bench.servers import LocalServer, others_paused, pinned
from lab.bench.statistics import Spread, advantage, spread
from lab.bench.suites import Concurrency, Decode, Prefill, Prefix
from lab.bench.timing import Timing, decode_rate_of_all, gap_percentiles, output_rate
from lab.tool import start
from server.text.tokenizer import Tokenizer
from tests.e2e.serving import until
from tests.lab.bench.kit import Told
from tests.server.cli.test_main import dsa
from tests.server.kit import TEXT, serving


def timing(sent: float, *arrivals: float, tokens: int | None = None, ended: float | None = None) -> Timing:
    return Timing(
        sent=sent, arrivals=arrivals, ended=arrivals[-1] if ended is None else ended, prompt_tokens=9,
        completion_tokens=len(arrivals) if tokens is None else tokens,
    )  # fmt: skip


@pytest.fixture(scope="module")
def words(tokenizer: Tokenizer) -> Words:
    return Words(tokenizer)


# ---- arithmetic -----------------------------------------------------------------------------------


def test_the_first_token_and_the_rate_behind_it() -> None:
    one = timing(10.0, 10.5, 10.6, 10.7, 10.8)
    assert one.first_token_seconds == pytest.approx(0.5)
    assert one.decode_rate == pytest.approx(3 / 0.3)
    assert one.gaps == pytest.approx([0.1, 0.1, 0.1])


def test_tokens_that_share_an_event_or_have_no_text_count_too() -> None:
    assert timing(0.0, 1.0, 2.0, tokens=9).decode_rate == pytest.approx(8.0)
    assert timing(0.0, 1.0, 2.0, tokens=4, ended=2.5).decode_rate == pytest.approx(2.0)
    silent = Timing(sent=1.0, arrivals=(), ended=3.0, prompt_tokens=9, completion_tokens=1)
    assert (silent.first_token_seconds, silent.decode_rate, silent.gaps) == (2.0, None, [])


def test_the_rate_of_all_is_taken_while_all_decode() -> None:
    early = timing(0.0, *(0.1 * i for i in range(1, 31)))  # 10 a second from 0.1 until 3.0
    late = timing(0.0, *(2.0 + 0.1 * i for i in range(21)))  # 10 a second from 2.0 until 4.0
    rate = decode_rate_of_all([early, late])
    assert rate == pytest.approx(20.0, rel=0.06)  # an event on the window's edge is in or out
    assert output_rate([early, late]) == pytest.approx(51 / 4.0)
    assert decode_rate_of_all([timing(0.0, 0.1, 0.2), timing(0.0, 0.3, 0.4)]) is None


def test_percentiles_of_gaps_are_by_nearest_rank() -> None:
    stream = [0.0]
    for i in range(100):
        stream.append(stream[-1] + (5.0 if i == 50 else 1.0))
    p50, p99 = gap_percentiles([timing(0.0, *stream)]) or (0.0, 0.0)
    assert (p50, p99) == (1.0, 1.0)  # one of a hundred is beyond the 99th
    p50, p99 = gap_percentiles([timing(0.0, *stream[:60]), timing(0.0, *stream[45:60])]) or (0.0, 0.0)
    assert (p50, p99) == (1.0, 5.0)
    assert gap_percentiles([timing(0.0, 1.0)]) is None


def test_medians_have_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread([]) is None


def test_the_advantage_is_over_the_best_of_the_others() -> None:
    def of(median: float) -> Spread:
        return Spread(median, median, median, 1)

    others = {"slow": of(10.0), "fast": of(20.0), "silent": None}
    assert advantage(of(30.0), others, "more") == pytest.approx(1.5)
    assert advantage(of(30.0), others, "less") == pytest.approx(10 / 30)
    assert advantage(of(30.0), {"silent": None}, "more") is None
    assert advantage(None, others, "more") is None


# ---- prompts --------------------------------------------------------------------------------------


def test_prompts_have_exact_lengths_and_survive_as_text(words: Words, tokenizer: Tokenizer) -> None:
    for length in (HEAD + 1, 128, 2048):
        ids = words.prompt(length, body="b", head="h")
        assert len(ids) == length
        assert tokenizer.encode(words.text(ids)) == ids


def test_equal_bodies_differ_from_the_first_word_where_heads_do(words: Words) -> None:
    one, other = words.prompt(64, body=1, head="a"), words.prompt(64, body=1, head="b")
    assert one[0] != other[0]
    assert one[HEAD:] == other[HEAD:]
    assert one == words.prompt(64, body=1, head="a")
    assert words.prompt(64, body=2, head="a")[:HEAD] == one[:HEAD]
    with pytest.raises(BenchError, match="too short; the shortest has 5"):
        words.prompt(HEAD, body=1, head=1)


def test_a_vocabulary_without_words_is_refused() -> None:
    with pytest.raises(BenchError, match="the tokenizer has 0 plain words"):
        Words(TEXT)


# ---- a server that is told what to do -------------------------------------------------------------


@contextmanager
def told_server(told: Told) -> Iterator[str]:
    """Run the server in another thread, so that the client does not delay it."""
    ready: list[str] = []
    begun, end = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(told.app()) as url:
            ready.append(url)
            begun.set()
            await asyncio.to_thread(end.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert begun.wait(10)
        yield ready[0]
    finally:
        end.set()
        thread.join(10)


async def times_come_out(told: Told, words: Words) -> None:
    """Every plan's figures are those of a server that is told its times."""
    with told_server(told) as url:
        async with connect("told", f"{url}/v1/") as endpoint:
            await endpoint.greet()
            ask = Asker(endpoint, words, as_text=False, run="r")
            values, (one,) = await Decode((64,), 11).sample(ask, 64, 0)
            assert one.first_token_seconds == pytest.approx(0.1, abs=0.05)
            assert 12 < values["decode_rate"] <= 50  # 20 ms each at the least; more on a machine in use
            assert 19 < values["gap_p50"] < 80
            _, (again,) = await Decode((64,), 11).sample(ask, 64, 1)
            assert again.first_token_seconds < 0.09  # the same prompt, which the server knows
            values, _ = await Prefill((200,)).sample(ask, 200, 0)
            assert 1000 < values["prefill_rate"] <= 2000
            values, _ = await Prefix((64,), 8).sample(ask, 64, 0)
            assert 0.15 < values["share"] < 0.8
            values, timings = await Concurrency((3,), 32, 11).sample(ask, 3, 0)
            assert 36 < values["decode_rate"] < 165
            assert len(timings) == 6  # cold, and cached
            assert values["ttft"] == pytest.approx(0.1, abs=0.05)


@pytest.mark.alone
async def test_known_times_come_out_as_they_are(words: Words) -> None:
    for left in (2, 1, 0):  # a machine that stalls makes an answer late, and cannot make one early
        told = Told(first=0.1, cached=0.02, gap=0.02)
        try:
            await times_come_out(told, words)
            break
        except AssertionError:
            if not left:
                raise
    decodes, prefix = told.bodies[:2], told.bodies[3:5]
    assert decodes[0]["prompt"] == decodes[1]["prompt"]
    assert (decodes[0]["temperature"], decodes[0]["ignore_eos"], decodes[0]["max_tokens"]) == (0, True, 11)
    assert prefix[0]["prompt"][:64] == prefix[1]["prompt"][:64]
    assert prefix[0]["prompt"][64:] != prefix[1]["prompt"][64:]
    heads = [tuple(body["prompt"][:HEAD]) for body in told.bodies]
    assert len(set(heads)) == len(heads) - 2 - 3  # all differ but those of prompts that must begin alike


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("whole", "told did not stream: it answered with application/json"),
        ("error", "told ended an answer with an error: out of pages"),
        ("endless", "told ended an answer without a finish reason"),
        ("no usage", "told did not count its tokens"),
        ("short", "told made 3 tokens where 4 were asked for; it must know ignore_eos"),
        ("other tokenizer", "told counted 33 tokens in a prompt of 32: its tokenizer is another one"),
        ("no models", "names no model at /v1/models"),
    ],
)
async def test_a_fault_is_one_sentence(words: Words, fault: str, sentence: str) -> None:
    with told_server(Told(fault=fault)) as url:
        async with connect("told", url) as endpoint:

            async def one() -> Timing:
                await endpoint.greet()
                return await Asker(endpoint, words, as_text=False, run="r").one(32, 4, body=0, head=0)

            with pytest.raises(BenchError, match=sentence):
                await one()


async def test_a_server_that_loads_or_is_not_there_is_not_yet_one() -> None:
    with told_server(Told(fault="loading")) as url:
        async with connect("told", url) as endpoint:
            await endpoint.greet()
            with pytest.raises(NotYetError, match="not ready: loading the model"):
                await endpoint.complete([1, 2], 4)
    async with connect("told", url) as endpoint:
        with pytest.raises(NotYetError, match="there is no server at"):
            await endpoint.greet()


async def test_fields_are_added_and_null_leaves_one_out() -> None:
    told = Told()
    with told_server(told) as url:
        async with connect("told", url, {"model": "told", "seed": 3, "ignore_eos": None}) as endpoint:
            await endpoint.complete([1, 2], 4)
        async with connect("told", url, {"model": "other"}) as endpoint:
            with pytest.raises(BenchError, match="told refused a request: there is no model 'other'"):
                await endpoint.complete([1, 2], 4)
    assert told.bodies[0]["seed"] == 3
    assert "ignore_eos" not in told.bodies[0]


# ---- servers that are started ---------------------------------------------------------------------

# Stands for a server: it starts a child in a session of its own, as a server starts its engine, and prints its id.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print(child.pid, sorted(os.sched_getaffinity(0)), flush=True)
time.sleep(60)
"""


@pytest.mark.process
def test_a_started_server_is_pinned_watched_and_stopped_with_its_children(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    server = LocalServer("it", f"{sys.executable} -c '{FAMILY}' {{port}}", tmp_path / "log", [core])
    try:
        until(lambda: bool((tmp_path / "log").read_text()))
        child, cores = (tmp_path / "log").read_text().strip().split(" ", 1)
        assert cores == f"[{core}]"
        assert (server.peak_memory() or 0) > 1 << 20
        assert os.sched_getaffinity(0) == before
    finally:
        server.stop()
    until(lambda: not Path("/proc", child).exists() or " Z " in Path("/proc", child, "stat").read_text())
    with pytest.raises(BenchError, match="it ended with exit status -15"):
        server.check()


@pytest.mark.process
def test_while_one_server_is_measured_the_others_stand_still(tmp_path: Path) -> None:
    servers = [
        LocalServer(name, f"{sys.executable} -c '{FAMILY}' {{port}}", tmp_path / name, None) for name in "ab"
    ]
    try:
        until(lambda: all((tmp_path / name).read_text() for name in "ab"))
        children = []
        for name in "ab":
            children.append(Path("/proc", (tmp_path / name).read_text().split()[0], "stat"))
        first, second = children
        with others_paused(servers, servers[0]):
            until(lambda: " T " in second.read_text())
            assert " T " not in first.read_text()
        until(lambda: " T " not in second.read_text())
        servers[1].pause()
    finally:
        for server in servers:
            server.stop()  # a paused server, too, ends before it is killed
    with pytest.raises(BenchError, match="b ended with exit status -15"):
        servers[1].check()


@pytest.mark.process
def test_a_server_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path) -> None:
    server = LocalServer(
        "it", f"{sys.executable} -c 'raise SystemExit(\"no model {{port}}\")'", tmp_path / "log", None
    )
    server._process.wait()
    with pytest.raises(BenchError, match=r"it ended with exit status 1; .*log ends with: no model \d+"):
        server.check()
    server.stop()
    with pytest.raises(BenchError, match="it cannot be started: .*nothing-of-the-kind"):
        LocalServer("it", "nothing-of-the-kind {port}", tmp_path / "log", None)
    with pytest.raises(BenchError, match=r"the command of it has no \{port\}"):
        LocalServer("it", "sleep 9", tmp_path / "log", None)
    with pytest.raises(BenchError, match="no core of 4096 is to be had"), pinned([4096]):
        pass


# ---- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["", "decode", "prefill", "concurrency", "prefix", "long", "overhead"])
def test_help_says_what_is_measured(suite: str) -> None:
    result = CliRunner().invoke(
        app, [*suite.split(), "--help"], env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}
    )
    assert result.exit_code == 0
    for word in (
        ["--endpoint", "--serve", "--cpus", "--rounds", "--out"] if suite else ["concurrency", "--serve"]
    ):
        assert word in result.output


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--contexts", "2K"], 2, "--contexts is '2K'; expected positive numbers"),
        (["--cpus", "two"], 2, "--cpus is 'two'; expected cores"),
        (["--endpoint", "http://127.0.0.1:9"], 2, "expected NAME=URL"),
        (["--endpoint", "a=http://127.0.0.1:9", "--endpoint", "a=http://127.0.0.1:9"], 2, "names 'a' twice"),
        (["--endpoint", "a=http://127.0.0.1:9", "--own", "b"], 2, "'b' is none of the servers; there are a"),
        (
            ["--endpoint", "a=http://127.0.0.1:9", "--fields", "a=[]"],
            2,
            "--fields of a is '[]'; expected a JSON object",
        ),
        (
            ["--endpoint", "a=http://127.0.0.1:9", "--serve", "a=x"],
            2,
            "'a' is named by --endpoint and by --serve",
        ),
        (
            ["--endpoint", "a=http://127.0.0.1:9", "--cpus", "0"],
            2,
            "--cpus is for servers that --serve starts",
        ),
        (
            ["--endpoint", "a=http://127.0.0.1:9"],
            1,
            "a cannot be measured: there is no server at http://127.0.0.1:9",
        ),
        (["nothing"], 1, "there is no model 'nothing'"),
    ],
)
def test_errors_are_one_sentence(
    tmp_path: Path, default_model: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int,
    sentence: str,
) -> None:  # fmt: skip
    assert start(app, "bench", ["decode", "--out", str(tmp_path / "bench"), *arguments]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert sentence in lines[0]


@pytest.mark.process
def test_the_command_measures_two_servers_in_turn(tmp_path: Path, default_model: Path) -> None:
    fast, slow = Told(), Told(gap=0.03)
    with told_server(fast) as one, told_server(slow) as other:
        result = dsa(
            "bench", "decode", "--contexts", "16,32", "--tokens", "8", "--rounds", "2", "--out", str(tmp_path),
            "--endpoint", f"fast={one}", "--endpoint", f"slow={other}", "--fields", 'slow={"seed": 1}', COLUMNS="120",
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"fast: \d+\.\d\d × as fast with 32 tokens of context as with 16", result.stdout)
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    results = load(tmp_path / "decode.json")
    assert [(s.case, s.turn, s.server) for s in results.samples] == [
        *((16, 0, "fast"), (16, 0, "slow"), (16, 1, "slow"), (16, 1, "fast")),
        *((32, 0, "fast"), (32, 0, "slow"), (32, 1, "slow"), (32, 1, "fast")),
    ]
    assert all(len(sample.requests[0].arrivals) == 8 for sample in results.samples)
    assert results.ratios[16]["decode_rate"] > 1.5
    assert results.command.startswith("dsa bench decode --contexts 16,32")
    assert results.machine["versions"]["dsa-serve"]
    # The warm-up, and two turns of two cases. The prompts of the two servers differ only in the head.
    assert len(fast.bodies) == len(slow.bodies) == 5
    assert [b["prompt"][HEAD:] for b in fast.bodies[1:]] == [b["prompt"][HEAD:] for b in slow.bodies[1:]]
    assert [b.get("seed") for b in slow.bodies] == [1] * 5
