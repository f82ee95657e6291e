"""A client of a few lines over plain sockets: what it measures is the server, not an HTTP library beside it.

Each request has a connection of its own. `Answer` has what came back and when, as seen from the first byte that was sent.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


class HungUpError(Exception):
    """`on_event` raises it: the client closes its connection in the middle of the answer."""


@dataclass
class Answer:
    """What one request got. Times are seconds since the request was begun; None: it did not come so far."""

    began: float  # on the monotonic clock
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""  # of an answer that is not a stream
    events: list[float] = field(default_factory=list)  # of a stream: when each event with data came
    ends: int = 0  # of a stream: terminal events, which are `[DONE]` and errors
    error: str | None = None  # the code of an error in a stream
    head: float | None = None
    seconds: float | None = None
    whole: bool = False  # the server ended the answer, and all of it came
    lost: str | None = None  # the connection broke, and how

    @property
    def terminal(self) -> int:
        """How many ends this request had; it should have one."""
        if self.status == 200 and self.streamed:
            return self.ends
        return int(self.whole)

    @property
    def streamed(self) -> bool:
        """Whether the answer is a stream of events."""
        return self.headers.get("content-type", "").startswith("text/event-stream")


def encoded(path: str, body: Any, *, method: str = "POST", **headers: str) -> bytes:
    """One request, as the bytes on the wire; a `body` of bytes is sent as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "127.0.0.1", "connection": "close", "content-type": "application/json"} | headers
    lines["content-length"] = str(len(content))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


async def ask(
    url: str,
    request: bytes,
    on_event: Callable[[Answer], Any] | None = None,
    *,
    pause: float = 0.0,
    read_bytes: int = 1 << 16,
) -> Answer:
    """Send one request and read its answer to the end.

    Args:
        url: the server's
        request: see `encoded`
        on_event: called after each event of a stream; it may raise `HungUpError`
        pause: a slow reader waits so long between two reads
        read_bytes: the most bytes of one read
    """
    split = urlsplit(url)
    answer = Answer(time.monotonic())
    writer = None
    try:
        reader, writer = await asyncio.open_connection(split.hostname, split.port, limit=1 << 16)
        writer.write(request)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        answer.head = time.monotonic() - answer.began
        first, *lines = head.decode("latin-1").split("\r\n")
        answer.status = int(first.split()[1])
        answer.headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if answer.streamed:
            await _stream(reader, answer, on_event, pause, read_bytes)
        else:
            answer.body = await reader.read(-1) if not pause else await _slowly(reader, pause, read_bytes)
            answer.whole = len(answer.body) >= int(answer.headers.get("content-length", 0))
    except HungUpError:
        pass
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        answer.lost = f"{type(error).__name__}: {error}"
    finally:
        if writer is not None:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()
    answer.seconds = time.monotonic() - answer.began
    return answer


async def _stream(
    reader: asyncio.StreamReader,
    answer: Answer,
    on_event: Callable[[Answer], Any] | None,
    pause: float,
    read_bytes: int,
) -> None:
    left = b""
    while part := await reader.read(read_bytes):
        *lines, left = (left + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            answer.events.append(time.monotonic() - answer.began)
            if line.startswith(b"data: [DONE]"):
                answer.ends += 1
            elif line.startswith(b'data: {"error"'):
                answer.ends += 1
                answer.error = json.loads(line.removeprefix(b"data: "))["error"].get("code")
            if on_event is not None:
                on_event(answer)
        if pause:
            await asyncio.sleep(pause)
    answer.whole = left.rstrip(b"\r\n") in (b"", b"0")  # the last chunk of HTTP's chunks


async def _slowly(reader: asyncio.StreamReader, pause: float, read_bytes: int) -> bytes:
    parts = b""
    while part := await reader.read(read_bytes):
        parts += part
        await asyncio.sleep(pause)
    return parts


def quantile(values: list[float], part: float) -> float:
    """The value below which `part` of the values lie, by the nearest rank; nan without values."""
    if not values:
        return float("nan")
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]
