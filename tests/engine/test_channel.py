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
from engine.protocol import Abort, Delta, EngineStats, Failed, Loading, StepOutput, ToServer


@asynccontextmanager
async def ends() -> AsyncGenerator[tuple[ServerEnd, socket.socket, list[ToServer]], None]:
    """The server's end, the engine's socket, and what the server heard."""
    ours, theirs = socket.socketpair()
    heard: list[ToServer] = []
    end = await ServerEnd.over(ours, heard.append)
    try:
        yield end, theirs, heard
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
    async with ends() as (end, theirs, heard):

        def write() -> None:
            for start in range(0, len(data), size):
                theirs.sendall(data[start : start + size])
            theirs.close()

        writer = asyncio.create_task(asyncio.to_thread(write))
        for _ in range(2):  # the end is the end, however often one asks
            await asyncio.wait_for(end.wait_closed(), 20)
        await writer
    assert heard == [*messages]


async def test_what_is_not_a_message_is_an_error_after_the_messages_before_it() -> None:
    for bad in (struct.pack(">I", 1 << 30), struct.pack(">I", 3) + b"abc"):
        async with ends() as (end, theirs, heard):
            theirs.sendall(frame(MESSAGES[0]) + bad + frame(MESSAGES[1]))
            for _ in range(2):
                with pytest.raises(ProtocolError):
                    await asyncio.wait_for(end.wait_closed(), 20)
            theirs.sendall(frame(MESSAGES[2]))
            await asyncio.sleep(0.01)
            assert heard == [MESSAGES[0]]


async def test_half_a_message_is_the_end() -> None:
    async with ends() as (end, theirs, heard):
        theirs.sendall(frame(MESSAGES[0])[:-1])
        theirs.close()
        await asyncio.wait_for(end.wait_closed(), 20)
        assert heard == []


async def test_a_fault_of_who_hears_is_told_to_who_waits() -> None:
    def mishear(message: object) -> None:
        raise KeyError(message)

    ours, theirs = socket.socketpair()
    end = await ServerEnd.over(ours, mishear)
    theirs.sendall(frame(MESSAGES[0]))
    with pytest.raises(KeyError):
        await asyncio.wait_for(end.wait_closed(), 20)
    end.close()
    theirs.close()


async def test_the_engine_hears_the_server_and_its_end() -> None:
    async with ends() as (end, theirs, _):
        engine = EngineEnd(theirs)
        end.send(Abort(request_id="r"))
        assert await asyncio.to_thread(engine.receive) == Abort(request_id="r")
        end.close()
        assert await asyncio.to_thread(engine.receive) is None
        end.send(Abort(request_id="r"))  # nobody is there; nothing happens
