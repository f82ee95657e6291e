"""Bodies made to stop the server: they are refused, and meanwhile probes answer and streams go on."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable

import pytest

from server.http.size import MAX_NUMBERS, MAX_VALUES, too_many
from tests.server.fake_engine import FakeEngine
from tests.server.http.test_connection import opened
from tests.server.kit import MODEL, chat_body, make_app, say, serving

SIZE = 7_000_000
GAP = 0.5
"""Seconds. On a quiet machine a probe takes 0.1 at most; this one may be shared."""


PROBE = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def completion(prompt: str) -> bytes:
    return f'{{"model":"{MODEL}","prompt":{prompt}}}'.encode()


def many(first: str, then: str) -> str:
    return "[" + first + f",{then}" * (SIZE // (len(then) + 1)) + "]"


def unknown_fields() -> bytes:
    fields = "".join(f',"u{i}":1' for i in range(200))
    message = f'{{"role":"user","content":"a"{fields}}}'
    return f'{{"model":"{MODEL}","messages":[{",".join([message] * 4096)}]}}'.encode()


def chat(content: str) -> bytes:
    return json.dumps(chat_body(content)).encode()


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "the first bad body, a small one": (lambda: completion("[1, 2, null]" + " " * 70_000), "valid integer"),
    "empty lists": (lambda: completion(many("[]", "[]")), "strings, lists"),
    "a number, then strings": (lambda: completion(many("1", '""')), "strings"),
    "a string, then numbers": (lambda: completion(many('"a"', "1")), "numbers"),
    "numbers": (lambda: completion(many("1", "1")), "numbers"),
    "fractions": (lambda: completion(many("1.5", "1.5")), "numbers"),
    "unknown fields": (unknown_fields, "strings"),
    "a deep list": (lambda: completion("[" * SIZE), "strings"),
    "a deep list of 60,000": (lambda: completion("[" * 60_000 + " " * 10_000), "recursion limit"),
    "a long number": (lambda: completion("1" * SIZE), "number out of range"),
    "digits": (lambda: completion('"' + "1" * 4_000_000 + '"'), "context is 10000 tokens"),
    "words": (lambda: completion('"' + "The cat sat. " * (SIZE // 13) + '"'), "context is 10000 tokens"),
    "control tokens": (lambda: chat("<|user|>" * (SIZE // 8)), "context is 10000 tokens"),
    "control tokens that nearly fit": (lambda: chat("<|user|>" * 9_000), "context"),
}


@pytest.mark.alone
@pytest.mark.timeout(120)
async def test_while_a_bomb_is_defused_everybody_else_is_served() -> None:
    engine = FakeEngine(lambda submit: say("x" * 50_000, delay=0.02, end=False), max_model_len=10_000)
    app = make_app(engine, max_body_bytes=8 << 20)
    gaps: dict[str, float] = {}
    async with serving(app) as url:
        body = json.dumps(chat_body(stream=True, max_tokens=9000)).encode()
        post = b"POST /v1/%s HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        stream, stream_writer = await opened(url, post % (b"chat/completions", len(body)) + body)
        await stream.readuntil(b"data: ")
        over = False
        worst = [0.0, 0.0]  # of a probe, and of the stream

        async def probe() -> None:
            while not over:
                began = time.monotonic()
                reader, writer = await opened(url, PROBE)
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
                writer.close()
                await writer.wait_closed()
                worst[0] = max(worst[0], time.monotonic() - began)
                await asyncio.sleep(0.02)

        async def listen() -> None:
            while not over:
                began = time.monotonic()
                await stream.readuntil(b"data: ")
                worst[1] = max(worst[1], time.monotonic() - began)

        for name, (make, words) in BOMBS.items():
            bomb = await asyncio.to_thread(make)
            await asyncio.sleep(0.5)
            worst[:] = 0.0, 0.0
            over = False
            others = [asyncio.create_task(probe()), asyncio.create_task(listen())]
            path = b"chat/completions" if b'"messages"' in bomb[:100] else b"completions"
            reader, writer = await opened(url, post % (path, len(bomb)) + bomb)
            answer = await reader.read()
            writer.close()
            assert answer.startswith(b"HTTP/1.1 400"), (name, answer[:300])
            assert words in json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"], name
            over = True
            await asyncio.gather(*others)
            gaps[name] = max(worst)
        stream_writer.close()
    print(gaps)
    assert {name: gap for name, gap in gaps.items() if gap > GAP} == {}


def test_what_is_counted() -> None:
    assert too_many(json.dumps(chat_body("a" * 10**6)).encode()) is None
    text = '"\\"[1,2,{\\\\"'
    assert too_many(f"[{','.join([text] * (MAX_VALUES - 1))}]".encode()) is None
    assert "strings" in (too_many(f"[{','.join([text] * MAX_VALUES)}]".encode()) or "")
    assert too_many(f"[{','.join(['-1.5e3'] * MAX_NUMBERS)}]".encode()) is None
    assert "numbers" in (too_many(f"[{', '.join(['7'] * (MAX_NUMBERS + 1))}]".encode()) or "")
    assert too_many(b'["' + b"\\" * 10**6) is None  # cut short: the parser refuses it
