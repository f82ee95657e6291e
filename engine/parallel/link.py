"""The messages between the processes of one engine, in the frames of `engine.channel`, never pickle.

On one host the sockets are inherited pairs. Another node has one TCP connection to the leader, over which both have
proved that they know the same secret (`engine.parallel.secret`) before anything here is read.

Plans are messages and not a collective operation, because a worker may wait for days for the next plan. A collective
that waits ends the group (after 10 minutes with NCCL) and keeps the device busy until then.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import msgspec

from engine.channel import MAX_FRAME_BYTES, decode, frame, framed, read_frame
from engine.config import EngineConfig
from engine.parallel.group import Meeting
from engine.protocol import Failed, Message

T = TypeVar("T")

MAX_MEETING_BYTES = 1 << 20
"""Far more than any message has that nodes exchange when they meet, or that a node sends later. Plans may be longer."""

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) while the processes meet and load."""


class Assignment(Message, frozen=True, kw_only=True):
    """The first message to a worker: what to load, and where to meet the other ranks."""

    config: EngineConfig
    rank: int
    meeting: Meeting
    address: str = ""  # this host's address if the leader is another host


class RankLoaded(Message, frozen=True, kw_only=True):
    """A worker has loaded its part of the model."""

    rank: int
    num_bytes: int  # of weights


class Hello(Message, frozen=True, kw_only=True):
    """The first message of a node that wants to join. The versions and the model must equal the leader's."""

    version: str  # version of dsa-serve
    torch: str
    model: str  # `engine.parallel.fingerprint.fingerprint` of the model's files
    path: str  # path of these files on the node, for messages


class Welcome(Message, frozen=True, kw_only=True):
    """The answer to a node once all nodes have joined: its ranks, and the config to start them with."""

    config: EngineConfig  # the leader's; the node replaces the paths by its own
    first_rank: int
    meeting: Meeting


FromWorker = RankLoaded | Failed
ToNode = Welcome | Failed


class Link:
    """One end of a connection. It blocks. At most one thread may read; any thread may write.

    Args:
        sock: the connection
        most: the bytes that a message from the other end may have
    """

    def __init__(self, sock: socket.socket, most: int = MAX_FRAME_BYTES) -> None:
        self._sock = sock
        self._most = most
        self._writing = threading.Lock()

    def send(self, value: msgspec.Struct) -> None:
        """Write one value.

        Raises:
            OSError: the other end is gone.
        """
        self._write(frame(value))

    def forward(self, body: bytes) -> None:
        """Write an encoded value, as `receive_body` of another link returned it.

        Raises:
            OSError: the other end is gone.
        """
        self._write(framed(body))

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
        """Read the next value; None if the other end is gone.

        Raises:
            ProtocolError: the bytes are not a value of the decoder's type.
        """
        body = self.receive_body()
        if body is None:
            return None
        value: T = decode(decoder, body)
        return value

    def receive_body(self) -> bytes | None:
        """Read the next value without decoding it; None if the other end is gone.

        Raises:
            ProtocolError: the bytes are not a frame, or it is longer than this link's messages.
        """
        return read_frame(self._sock, self._most)

    def close(self) -> None:
        """Close the socket; the other end sees the end of the stream."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # `close` alone would not wake a thread that reads
        self._sock.close()

    def _write(self, data: bytes) -> None:
        with self._writing:
            self._sock.sendall(data)
