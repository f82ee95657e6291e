"""The mailbox: one reader gets all items in order, and a cancelled wait loses none."""

from __future__ import annotations

import asyncio

import pytest

from server.generation.mailbox import Mailbox


async def test_items_come_in_order_waited_for_or_not() -> None:
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.put(2)
    assert len(box) == 2
    assert [await box.get(), await box.get(0.0)] == [1, 2]
    reader = asyncio.create_task(box.get(60.0))
    await asyncio.sleep(0)
    box.put(3)
    box.put(4)
    assert await reader == 3
    assert await box.get() == 4


async def test_a_wait_ends_and_the_next_begins_anew() -> None:
    box: Mailbox[int] = Mailbox()
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await box.get(0.001)
    asyncio.get_running_loop().call_later(0.01, box.put, 5)
    assert await box.get(60.0) == 5
    await asyncio.sleep(0.002)  # the alarm of the wait before must not disturb the next wait
    with pytest.raises(TimeoutError):
        await box.get(0.001)


async def test_a_reader_that_is_cancelled_takes_nothing_with_it() -> None:
    box: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    box.put(1)  # wakes it
    reader.cancel()  # before it ran
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert await box.get() == 1


async def test_it_has_one_reader() -> None:
    box: Mailbox[int] = Mailbox()
    reader = asyncio.create_task(box.get())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await box.get()
    box.put(1)
    assert await reader == 1
