"""What the engine process and a worker say to each other: frames on an inherited socket pair, as to the server.

Plans go this way and not as a collective: a worker may wait for the next one for days, and a collective that
waits so long ends the group (after 10 minutes with NCCL) and keeps the device busy until then.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TypeVar

import msgspec

from engine.channel import decode, frame, read_frame
from engine.protocol import Failed, Message

T = TypeVar("T")


class Loaded(Message, frozen=True, kw_only=True):
    """A worker has its part of the model."""

    num_bytes: int  # of weights


FromWorker = Loaded | Failed


class Link:
    """One end, blocking; one reader thread and one writer thread at most."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, value: msgspec.Struct) -> None:
        """Write one value; raises OSError when the other end is gone."""
        self._sock.sendall(frame(value))

    def receive(self, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
        """The next value, or None when the other end is gone.

        Raises:
            ProtocolError: what came is no such value.
        """
        body = read_frame(self._sock)
        if body is None:
            return None
        value: T = decode(decoder, body)
        return value

    def close(self) -> None:
        """The other end sees the end of the stream."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # close alone leaves a thread that reads waiting
        self._sock.close()
