"""Frames on a stream socket: a 4-byte big-endian length, then one msgpack message. No pickle, no ports."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from engine.errors import ProtocolError
from engine.protocol import ToEngine, ToServer

MAX_FRAME_BYTES = 256 << 20
"""Far above any real message; a length beyond it means that the stream is out of step."""

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def frame(message: msgspec.Struct) -> bytes:
    """A message as bytes on the wire."""
    return framed(encode(message))


def encode(message: msgspec.Struct) -> bytes:
    """A frame's body."""
    return _encoder.encode(message)


def framed(body: bytes) -> bytes:
    """A frame of a body."""
    return _HEADER.pack(len(body)) + body


def _body_length(header: bytes | bytearray) -> int:
    (length,) = _HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"a frame announced {length} bytes, more than the {MAX_FRAME_BYTES} that any message has"
        )
    return int(length)


def decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    """The message in a frame's body; raises ProtocolError where there is none."""
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from None


def read_frame(sock: socket.socket) -> bytes | None:
    """The body of the next frame of a blocking socket, or None when the other side has closed its end.

    Raises:
        ProtocolError: what came is not a frame.
    """
    header = _read(sock, _HEADER.size)
    return None if header is None else _read(sock, _body_length(header))


def _read(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = sock.recv(min(count - len(parts), 1 << 20))
        except (ConnectionResetError, TimeoutError):  # the latter: a host that no longer answers
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


class EngineEnd:
    """The engine's side: blocking, one reader thread at most; any thread may write."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writing = threading.Lock()

    def send(self, message: ToServer) -> None:
        """Write a message; raises OSError when the server is gone."""
        data = frame(message)
        with self._writing:
            self._sock.sendall(data)

    def receive(self) -> ToEngine | None:
        """The next message, or None when the server has closed its end.

        Raises:
            ProtocolError: what came is not a message.
        """
        body = read_frame(self._sock)
        if body is None:
            return None
        message: ToEngine = decode(_to_engine, body)
        return message


class _Incoming(asyncio.Protocol):
    """Cuts what the engine sends into messages as it comes, and hands each over at once.

    Not asyncio's streams, whose reader wakes twice a frame, and no task that waits for messages: beside a busy
    model each wake-up takes some 40 microseconds, and every token of every stream comes through here.
    """

    def __init__(self, hear: Callable[[ToServer], None]) -> None:
        self._hear = hear
        self._bytes = bytearray()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if self.closed.done():
            return
        self._bytes += data
        try:
            while (body := self._next_body()) is not None:
                self._hear(decode(_to_server, body))
        except Exception as error:
            self.closed.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop."""
        if not self.closed.done():
            self.closed.set_result(None)

    def _next_body(self) -> bytes | None:
        if len(self._bytes) < _HEADER.size:
            return None
        end = _HEADER.size + _body_length(self._bytes[: _HEADER.size])
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_HEADER.size : end])
        del self._bytes[:end]
        return body


class ServerEnd:
    """The server's side: asyncio."""

    def __init__(self, transport: asyncio.WriteTransport, incoming: _Incoming) -> None:
        self._transport = transport
        self._incoming = incoming

    @classmethod
    async def over(cls, sock: socket.socket, hear: Callable[[ToServer], None]) -> ServerEnd:
        """Wrap a connected AF_UNIX stream socket; owns it from now on. `hear` gets each message."""
        loop = asyncio.get_running_loop()
        return cls(*await loop.create_unix_connection(lambda: _Incoming(hear), sock=sock))

    def send(self, message: ToEngine) -> None:
        """Queue a message for writing; messages are few and small, so nobody waits for the drain."""
        if not self._transport.is_closing():
            self._transport.write(frame(message))

    async def wait_closed(self) -> None:
        """Return when the engine is gone.

        Raises:
            ProtocolError: what came is not a message; no more is heard.
            Exception: what `hear` raised; likewise.
        """
        await asyncio.shield(self._incoming.closed)

    def close(self) -> None:
        """Close the socket; the engine sees the end of the stream and leaves."""
        self._transport.close()
