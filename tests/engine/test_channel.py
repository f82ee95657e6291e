"""Messages over a real pair of sockets, however the bytes are cut."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from engine.channel import EngineEnd, ServerEnd, frame
from engine.errors import ProtocolError
from engine.protocol import Abort, Delta, EngineStats, Failed, Loading, StepOutput


@asynccontextmanager
async def ends() -> AsyncGenerator[tuple[ServerEnd, socket.socket], None]:
    ours, theirs = socket.socketpair()
    end = await ServerEnd.over(ours)
    try:
        yield end, theirs
    finally:
        end.close()
        theirs.close()


MESSAGES = (
    Loading(stage="loading", done=1, total=2),
    StepOutput(deltas=tuple(Delta(request_id="r" * 50, token_ids=(i,)) for i in range(9)), stats=EngineStats()),
    Failed(message="x" * 70_000),
)  # fmt: skip


@pytest.mark.parametrize("size", [1 << 20, 4096, 3, 1])
async def test_every_message_comes_whole_and_in_order(size: int) -> None:
    messages = MESSAGES if size > 3 else MESSAGES[:2]
    data = b"".join(map(frame, messages))
    async with ends() as (end, theirs):

        def write() -> None:
            for start in range(0, len(data), size):
                theirs.sendall(data[start : start + size])
            theirs.close()

        writer = asyncio.create_task(asyncio.to_thread(write))
        received = []
        while (message := await asyncio.wait_for(end.receive(), 20)) is not None:
            received.append(message)
        await writer
        assert await end.receive() is None  # and it stays so
    assert received == [*messages]


async def test_what_is_not_a_message_is_an_error_after_the_messages_before_it() -> None:
    for bad in (struct.pack(">I", 1 << 30), struct.pack(">I", 3) + b"abc"):
        async with ends() as (end, theirs):
            theirs.sendall(frame(MESSAGES[0]) + bad + frame(MESSAGES[1]))
            assert await end.receive() == MESSAGES[0]
            for _ in range(2):
                with pytest.raises(ProtocolError):
                    await asyncio.wait_for(end.receive(), 20)


async def test_half_a_message_is_the_end() -> None:
    async with ends() as (end, theirs):
        theirs.sendall(frame(MESSAGES[0])[:-1])
        theirs.close()
        assert await asyncio.wait_for(end.receive(), 20) is None


async def test_a_wait_that_is_cancelled_loses_nothing() -> None:
    async with ends() as (end, theirs):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(end.receive(), 0.01)
        theirs.sendall(frame(MESSAGES[0]))
        assert await asyncio.wait_for(end.receive(), 20) == MESSAGES[0]


async def test_the_engine_hears_the_server_and_its_end() -> None:
    async with ends() as (end, theirs):
        engine = EngineEnd(theirs)
        end.send(Abort(request_id="r"))
        assert await asyncio.to_thread(engine.receive) == Abort(request_id="r")
        end.close()
        assert await asyncio.to_thread(engine.receive) is None
        end.send(Abort(request_id="r"))  # nobody is there; nothing happens
