"""The raw client of many streams reads what servers send, however it is cut, and counts the ends of each stream."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.bench.crowd import Crowd, ask, read
from lab.bench.errors import BenchError
from tests.server.kit import completion_body, make_app, serving, speaking

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENTS = [
    b'data: {"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n',
    b": keep-alive\n\n",
    b'data: {"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":null}]}\n\n',
    b'data: {"choices":[{"index":0,"text":"","finish_reason":"length"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
    b"data: [DONE]\n\n",
]
ERROR = b'data: {"error":{"message":"the engine died"}}\n\n'


def chunked(events: list[bytes]) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"


@given(cuts=st.lists(st.integers(1, len(chunked(EVENTS)) - 1), unique=True).map(sorted))
def test_pieces_may_be_cut_anywhere(cuts: list[int]) -> None:
    whole = chunked(EVENTS)
    edges = [0, *cuts, len(whole)]
    pieces = [(float(i), whole[a:b]) for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))]  # noqa: RUF007
    ending = read(-1.0, pieces)
    timing = ending.answered()
    assert (ending.text, ending.terminal, ending.status) == ("ab", 1, 200)
    assert (timing.prompt_tokens, timing.completion_tokens, timing.sent) == (3, 2, -1.0)
    for arrival, event in zip(
        [*timing.arrivals, timing.ended], (EVENTS[0], EVENTS[2], EVENTS[3]), strict=True
    ):
        last = whole.index(event) + len(event) - 1  # the byte that completes the event
        assert arrival == sum(cut <= last for cut in cuts)


@pytest.mark.parametrize(
    ("answer", "status", "terminal", "words"),
    [
        (chunked([EVENTS[0], ERROR]), 200, 1, "the engine died"),
        (chunked([*EVENTS, ERROR]), 200, 2, "the engine died"),
        (chunked(EVENTS[:-1]), 200, 0, "no error"),
        (chunked(EVENTS)[:-120], 200, 0, "no error"),
        (b'HTTP/1.1 429 Too Many\r\ncontent-length: 33\r\n\r\n{"error":{"message":"full today"}}', 429, 0, "full today"),
        (b"", 0, 0, "no error"),
    ],
)  # fmt: skip
def test_what_went_wrong_is_told(answer: bytes, status: int, terminal: int, words: str) -> None:
    ending = read(0.0, [(1.0, answer)] if answer else [])
    assert (ending.status, ending.terminal) == (status, terminal)
    with pytest.raises(BenchError, match=words):
        ending.answered()


async def test_a_crowd_on_a_real_server() -> None:
    async with serving(make_app(speaking("hello", delay=0.002))) as url:
        fields = {"stream": True, "stream_options": {"include_usage": True}}
        bodies = (*(completion_body(str(i), **fields) for i in range(5)), completion_body(max_tokens=-1))
        async with asyncio.timeout(20):
            report = await ask(Crowd(url=url, bodies=bodies))
    *good, bad = report.endings
    assert [ending.text for ending in good] == ["hello"] * 5
    assert all(len(ending.answered().arrivals) == 5 for ending in good)
    assert bad.status == 400
    assert "max_tokens" in (bad.error or "")
    assert report.seconds > 0.008
    assert report.reads >= 25
