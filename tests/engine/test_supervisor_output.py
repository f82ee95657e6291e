"""What an engine process writes, handed over at ends of lines."""

from __future__ import annotations

import asyncio

from engine.config import EngineConfig
from engine.supervisor import SubprocessEngine


async def test_output_is_cut_at_ends_of_lines() -> None:
    heard: list[str] = []
    engine = SubprocessEngine(EngineConfig(weights="nowhere"), on_output=heard.append)
    stream = asyncio.StreamReader()
    stream.feed_data(b"one\ntw")
    passing = asyncio.create_task(engine._pass_on(stream))
    await asyncio.sleep(0.01)
    assert heard == ["one"]
    stream.feed_data(b"o\nTraceback\n  line\nthe \xff end")
    await asyncio.sleep(0.01)
    assert heard == ["one", "two\nTraceback\n  line"]
    stream.feed_data(b"x" * (1 << 17))  # no newline for long: memory stays bounded
    await asyncio.sleep(0.01)
    assert sum(map(len, heard)) > 1 << 16
    stream.feed_eof()
    await passing
    assert "".join(heard).endswith("x")
    assert sum(text.count("x") for text in heard) == 1 << 17
