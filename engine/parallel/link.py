"""What the processes of one engine say to each other: frames on a socket, as to the server, and never pickle.

On one host the sockets are inherited pairs; a node of its own has one TCP connection to the leader.

Plans go this way and not as a collective: a worker may wait for the next one for days, and a collective that
waits so long ends the group (after 10 minutes with NCCL) and keeps the device busy until then.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from engine.channel import decode, frame, framed, read_frame
from engine.config import EngineConfig
from engine.parallel.group import Meeting
from engine.protocol import Failed, Message

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while the processes meet and load."""


class Assignment(Message, frozen=True, kw_only=True):
    """To a worker, first: what to compute with."""

    config: EngineConfig
    rank: int
    meeting: Meeting
    address: str = ""  # of this host, where the leader is on another


class Loaded(Message, frozen=True, kw_only=True):
    """A worker has its part of the model."""

    rank: int
    num_bytes: int  # of weights


class Hello(Message, frozen=True, kw_only=True):
    """From a node that wants to take part, first. All of it must be the leader's."""

    version: str  # of this program
    torch: str
    model: str  # `engine.parallel.fingerprint.fingerprint` of its files
    path: str  # where it has them, for people


class Welcome(Message, frozen=True, kw_only=True):
    """To a node, once all are there: its ranks, and what to start them with."""

    config: EngineConfig  # but for the paths, which are the node's own
    first_rank: int
    meeting: Meeting


FromWorker = Loaded | Failed
ToNode = Welcome | Failed


class Link:
    """One end, blocking; one reader thread at most, any thread may write."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writing = threading.Lock()

    def send(self, value: msgspec.Struct) -> None:
        """Write one value; raises OSError when the other end is gone."""
        self._write(frame(value))

    def forward(self, body: bytes) -> None:
        """Write what `receive_body` gave elsewhere; errors likewise."""
        self._write(framed(body))

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
        """The next value, or None when the other end is gone.

        Raises:
            ProtocolError: what came is no such value.
        """
        body = self.receive_body()
        if body is None:
            return None
        value: T = decode(decoder, body)
        return value

    def receive_body(self) -> bytes | None:
        """The next value as it came, or None when the other end is gone."""
        return read_frame(self._sock)

    def close(self) -> None:
        """The other end sees the end of the stream."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # close alone leaves a thread that reads waiting
        self._sock.close()

    def _write(self, data: bytes) -> None:
        with self._writing:
            self._sock.sendall(data)
