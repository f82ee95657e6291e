"""A stream's events are written at once; a client that does not read costs little and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from engine.protocol import TokenLogprob
from server.chat.parts import Content, Reasoning
from server.generation.choice import TextDelta, join_texts
from server.generation.generate import Generation
from server.generation.render import ChatRenderer
from server.generation.streamed import Head, Shown
from server.http import reply
from server.http.outlet import _MANY, Outlet
from server.http.protocol import sse
from tests.server.fake_engine import FakeEngine
from tests.server.generation.test_generate import jobs
from tests.server.http.test_disconnect import until
from tests.server.kit import TEXT, chat_body, make_app, say, serving, speaking


def text(content: str, index: int = 0) -> TextDelta:
    return TextDelta(index, (Content(content),), (65,))


def plain(delta: TextDelta) -> bytes:
    return delta.text.encode()


class Door:
    """An ASGI `send` that waits while it is shut."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()

    async def send(self, message: Message) -> None:
        await asyncio.sleep(0) if not self.open.is_set() else None
        await self.open.wait()
        self.bodies.append(message["body"])


async def test_what_a_client_reads_is_written_before_put_returns() -> None:
    door = Door()
    outlet = Outlet(door.send, plain)
    for content in ("a", "", "b"):
        outlet.put(text(content))
    assert door.bodies == [b"a", b"b"]
    assert not outlet.slow
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"slow reader"})
    await outlet.drain()
    await outlet.close()


async def test_a_slow_reader_gets_everything_in_order_and_holds_little() -> None:
    door = Door()
    outlet = Outlet(door.send, plain)
    outlet.put(text("<"))
    door.open.clear()
    most = 0
    for number in range(20 * _MANY):
        outlet.put(text(chr(97 + number % 26)))
        most = max(most, outlet.held)
        if number % _MANY == 0:
            await asyncio.sleep(0)
    assert outlet.slow
    assert most < 2 * _MANY
    assert door.bodies == [b"<"]
    door.open.set()
    await outlet.drain()
    assert not outlet.slow
    outlet.put(text(">"))
    whole = b"".join(door.bodies).decode()
    assert whole == "<" + "".join(chr(97 + number % 26) for number in range(20 * _MANY)) + ">"
    assert len(door.bodies) < 6


async def test_a_reader_may_be_slow_again_and_again() -> None:
    door = Door()
    outlet = Outlet(door.send, plain)
    expected = ""
    for turn in range(50):
        door.open.clear() if turn % 3 == 0 else door.open.set()
        for number in range(turn % 5):
            outlet.put(text(f"{turn}.{number} "))
            expected += f"{turn}.{number} "
        await asyncio.sleep(0)
    door.open.set()
    await outlet.drain()
    assert b"".join(door.bodies).decode() == expected


async def test_closing_ends_the_wait_for_a_slow_reader() -> None:
    door = Door()
    door.open.clear()
    outlet = Outlet(door.send, plain)
    outlet.put(text("a"))
    outlet.put(text("b"))
    await asyncio.sleep(0)
    await outlet.close()
    door.open.set()
    await asyncio.sleep(0)
    assert door.bodies == []


@pytest.mark.parametrize("slow", [False, True])
async def test_an_error_of_the_server_comes_out(slow: bool) -> None:
    async def fail(message: Message) -> None:
        if slow:
            await asyncio.sleep(0)
        raise OSError("the socket broke")

    outlet = Outlet(fail, plain)

    async def use() -> None:
        outlet.put(text("a"))
        await outlet.drain()

    with pytest.raises(OSError, match="broke"):
        await use()
    await outlet.close()


LOGPROB = TokenLogprob(token_id=65, logprob=-0.5, rank=1, top=())
deltas = st.builds(
    TextDelta,
    index=st.integers(0, 2),
    parts=st.lists(
        st.one_of(st.builds(Content, st.text("ab", max_size=3)), st.builds(Reasoning, st.text("xy", max_size=2))),
        max_size=2,
    ).map(tuple),
    token_ids=st.just(()),
    logprobs=st.sampled_from([None, None, None, (LOGPROB,)]),
    finish_reason=st.sampled_from([None, None, None, None, "stop"]),
)  # fmt: skip


@given(stream=st.lists(deltas, max_size=12))
def test_joining_keeps_each_choices_parts_in_order(stream: list[TextDelta]) -> None:
    joined = join_texts(stream)
    assert len(joined) <= len(stream)
    for index in range(3):
        before = [delta for delta in stream if delta.index == index]
        after = [delta for delta in joined if delta.index == index]
        assert [d for d in after if not d.only_text] == [d for d in before if not d.only_text]
        assert _spelled(after) == _spelled(before)
        assert not any(a.only_text and b.only_text for a, b in itertools.pairwise(after))


def _spelled(deltas: list[TextDelta]) -> str:
    """Every character with its kind, and every end."""
    out = ""
    for delta in deltas:
        for part in delta.parts:
            assert isinstance(part, Content | Reasoning)
            out += part.text
        out += "!" * (delta.logprobs is not None) + "." * (delta.finish_reason is not None)
    return out


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("stop", [(), ("endné\u2028 !",), ('ed"\n',)])
async def test_a_stream_has_the_bytes_of_its_plain_objects(group: int, stop: tuple[str, ...]) -> None:
    """The reference: every delta as objects, every object as an event."""
    said = 'né\u2028 "quoted"\n\t中文 👩‍👧 end' * 3
    body = chat_body(stream=True, n=2, max_tokens=100) | ({"stop": list(stop)} if stop else {})
    async with serving(make_app(speaking(said, group=group))) as url, httpx.AsyncClient() as http:
        got = await (await http.post(f"{url}/v1/chat/completions", json=body)).aread()
    first = json.loads(got.partition(b"\n\n")[0].removeprefix(b"data: "))
    two = [dataclasses.replace(job, stop=stop) for job in jobs(2)]
    renderer = ChatRenderer(
        Head(first["id"], first["created"], first["model"], first["system_fingerprint"]),
        text=TEXT,
        jobs=two,
        shown=Shown(),
    )
    seen: list[TextDelta] = []
    async with Generation(speaking(said, group=group), TEXT, two) as generation:
        generation.listen(seen.append)
        await generation.over()
    events = [sse.chunk(chunk) for delta in seen for chunk in renderer.chunks(delta)]
    for index in (0, 1):  # the order of the two choices is not promised
        mark = b'"choices":[{"index":%d,' % index
        assert [e for e in got.split(b"\n\n") if mark in e] == [e.strip() for e in events if mark in e]
    assert got.endswith(b"\n\n" + sse.DONE)
    assert got.count(b"\n\n") == len(events) + 1


@contextlib.asynccontextmanager
async def lazy_client(url: str, body: dict[str, Any]) -> AsyncGenerator[socket.socket, None]:
    """Send a request on a socket that takes little until it is read."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\nconnection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        await loop.sock_sendall(client, head.encode() + data)
        yield client


PIECES, PIECE = 500, 1000


def talkative() -> FakeEngine:
    return FakeEngine(
        lambda submit: say("~" * PIECES * PIECE, group=PIECE, end=False), max_model_len=2 * PIECES * PIECE
    )


@pytest.fixture
def outlets(monkeypatch: pytest.MonkeyPatch) -> list[Outlet]:
    made: list[Outlet] = []

    class Noted(Outlet):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(reply, "Outlet", Noted)
    return made


async def test_a_client_that_reads_late_gets_the_whole_answer(outlets: list[Outlet]) -> None:
    engine = talkative()
    answer = b""
    async with (
        serving(make_app(engine), buffer=8192) as url,
        lazy_client(url, chat_body(stream=True)) as client,
    ):
        await until(lambda: bool(engine.finished), 60.0)
        assert outlets[0].slow
        assert outlets[0].held < 2 * _MANY
        while data := await asyncio.get_running_loop().sock_recv(client, 1 << 20):
            answer += data
    assert answer.count(b"[DONE]") == 1
    assert answer.endswith(b"0\r\n\r\n")
    assert answer.partition(b"\r\n\r\n")[2].count(b"~") == PIECES * PIECE


async def test_a_client_that_hangs_up_without_reading_ends_its_request(outlets: list[Outlet]) -> None:
    engine = FakeEngine(
        lambda submit: say("~" * PIECES * PIECE, group=PIECE, end=False, delay=0.0005),
        max_model_len=2 * PIECES * PIECE,
    )
    app = make_app(engine)
    async with serving(app, buffer=8192) as url:
        async with lazy_client(url, chat_body(stream=True)):
            await until(lambda: bool(outlets) and outlets[0].slow, 60.0)
        await until(lambda: bool(engine.aborted), 5.0)
        assert await app.state.lifecycle.wait_idle(5.0)
    assert {task.get_name() for task in asyncio.all_tasks()}.isdisjoint({"slow reader"})
