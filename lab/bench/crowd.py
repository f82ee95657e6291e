"""Many streams of one server from one process, at a few microseconds an event: a raw HTTP client that parses at the end.

`python -P -m lab.bench.crowd` reads a `Crowd` as JSON from its standard input and writes a `CrowdReport` as JSON to its
standard output. So a measurement can start several of them, each on a core of its own. All times are seconds of the
monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec

from lab.bench.errors import BenchError
from lab.bench.timing import Timing


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask.

    Attributes:
        url: the server's address, without a path.
        path: the endpoint.
        bodies: a body for each stream; all are sent at once.
        begin: when to send them, on the monotonic clock; a moment in the past is now.
    """

    url: str
    path: str = "/v1/completions"
    bodies: tuple[dict[str, Any], ...]
    begin: float = 0.0


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a stream ended.

    Attributes:
        timing: the times of a stream that was answered completely, else None.
        status: the HTTP status; 0: the connection ended without an answer.
        terminal: how many terminal events it had: `[DONE]`, or an `error` event. Exactly one is right.
        error: the message of the error event or of the refusal.
        text: the answer.
    """

    timing: Timing | None
    status: int
    terminal: int
    error: str | None = None
    text: str = ""

    def answered(self) -> Timing:
        """Return the times of a stream that must have been answered well.

        Raises:
            BenchError: it was not.
        """
        if self.timing is None or self.terminal != 1 or self.error is not None:
            raise BenchError(
                f"a stream went wrong: status {self.status}, {self.terminal} terminal events, {self.error or 'no error'}"
            )
        return self.timing


class CrowdReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came.

    Attributes:
        endings: one for each body, in its order.
        seconds: from the first byte that was sent to the last that came.
        cpu_seconds: what this client used of the processor meanwhile.
        reads: how often bytes came; a read may have several events.
    """

    endings: tuple[Ending, ...]
    seconds: float
    cpu_seconds: float
    reads: int


class _Stream(asyncio.Protocol):
    """Sends one request, and keeps each piece of the answer with the time when it came."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.sent = 0.0
        self.pieces: list[tuple[float, bytes]] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def begin(self) -> None:
        """Send the request."""
        assert self._transport is not None
        self.sent = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


async def ask(crowd: Crowd) -> CrowdReport:
    """Send every body at once over a connection of its own, and read all answers to their ends."""
    address = urlsplit(crowd.url)
    host, port = address.hostname or "", address.port or 80
    loop = asyncio.get_running_loop()
    streams: list[_Stream] = []
    for body in crowd.bodies:
        request = _request(address.netloc, crowd.path, body)
        stream = _Stream(request)
        streams.append(stream)
        await loop.create_connection(lambda stream=stream: stream, host, port)  # type: ignore[misc]
    await asyncio.sleep(max(0.0, crowd.begin - time.perf_counter()))
    began, used = time.perf_counter(), time.process_time()
    for stream in streams:
        stream.begin()
    await asyncio.gather(*(stream.over for stream in streams))
    used = time.process_time() - used
    last = max((stream.pieces[-1][0] for stream in streams if stream.pieces), default=began)
    return CrowdReport(
        endings=tuple(read(stream.sent, stream.pieces) for stream in streams),
        seconds=last - began,
        cpu_seconds=used,
        reads=sum(len(stream.pieces) for stream in streams),
    )


def environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds this project's sources before all others."""
    root, known = str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": root if not known else root + os.pathsep + known}


class CrowdProcess:
    """A process that asks a crowd. It begins at once."""

    def __init__(self, crowd: Crowd) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "lab.bench.crowd"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(),
        )  # fmt: skip
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(crowd))

    def report(self) -> CrowdReport:
        """Wait for its end.

        Raises:
            BenchError: the process failed.
        """
        assert self._process.stdout is not None
        with self._process:
            data = self._process.stdout.read()
        if self._process.returncode:
            raise BenchError(f"a client process ended with exit status {self._process.returncode}")
        return msgspec.json.decode(data, type=CrowdReport)

    def kill(self) -> None:
        """End the process now; the system closes its connections."""
        with self._process:
            self._process.kill()


def _request(host: str, path: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def read(sent: float, pieces: Sequence[tuple[float, bytes]]) -> Ending:
    """Parse an answer from its pieces, each with the time when it came."""
    whole = b"".join(piece for _, piece in pieces)
    head, _, rest = whole.partition(b"\r\n\r\n")
    if not whole.startswith(b"HTTP/1.1 "):
        return Ending(timing=None, status=0, terminal=0)
    status = int(head[9:12])
    if b"chunked" not in head.lower():
        return Ending(timing=None, status=status, terminal=0, error=_message(rest))
    return _read_stream(sent, status, _dechunked(whole, len(head) + 4), _Clock(pieces))


def _dechunked(whole: bytes, at: int) -> list[tuple[int, bytes]]:
    """The chunks of a body that begins at `at`, each with the place in `whole` where it ends."""
    chunks: list[tuple[int, bytes]] = []
    while (line := whole.find(b"\r\n", at)) >= 0:
        size = int(whole[at:line], 16)
        end = line + 2 + size
        if not size or end > len(whole):
            break
        chunks.append((end, whole[line + 2 : end]))
        at = end + 2
    return chunks


class _Clock:
    """Says when a byte came. It is asked for places in ascending order."""

    def __init__(self, pieces: Sequence[tuple[float, bytes]]) -> None:
        self._pieces = pieces
        self._piece = 0
        self._end = len(pieces[0][1])

    def at(self, place: int) -> float:
        while place > self._end:
            self._piece += 1
            self._end += len(self._pieces[self._piece][1])
        return self._pieces[self._piece][0]


def _read_stream(sent: float, status: int, chunks: Sequence[tuple[int, bytes]], clock: _Clock) -> Ending:
    arrivals: list[float] = []
    texts: list[str] = []
    ended: float | None = None
    usage: dict[str, Any] | None = None
    terminal, error = 0, None
    rest = b""
    for place, chunk in chunks:
        *blocks, rest = (rest + chunk).split(b"\n\n")
        came = clock.at(place)
        for block in blocks:
            if not block.startswith(b"data: "):
                continue
            if block == b"data: [DONE]":
                terminal += 1
                continue
            event = json.loads(block[6:])
            if "error" in event:
                terminal += 1
                error = _message(block[6:])
                continue
            for choice in event["choices"]:
                text = choice.get("text") or choice.get("delta", {}).get("content")
                if text:
                    arrivals.append(came)
                    texts.append(text)
                if choice.get("finish_reason"):
                    ended = came
            usage = event.get("usage") or usage
    timing = None
    if ended is not None and usage is not None:
        timing = Timing(
            sent=sent,
            arrivals=tuple(arrivals),
            ended=ended,
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        )
    return Ending(timing=timing, status=status, terminal=terminal, error=error, text="".join(texts))


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return data[:200].decode(errors="replace")


def main() -> None:
    """Read a `Crowd`, ask, and write the `CrowdReport`."""
    import uvloop

    crowd = msgspec.json.decode(sys.stdin.buffer.read(), type=Crowd)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.buffer.write(msgspec.json.encode(runner.run(ask(crowd))))


if __name__ == "__main__":
    main()
