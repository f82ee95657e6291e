"""Sends and reads frames on a stream socket: a 4-byte big-endian length, then one msgpack message.

Messages are plain data (`engine.protocol`), never pickle. The socket is an inherited pair, not a port.
"""

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
"""Far more than any real message has. A larger length means that the reader lost the frame boundaries."""

_HEADER = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_server: msgspec.msgpack.Decoder[ToServer] = msgspec.msgpack.Decoder(ToServer)


def frame(message: msgspec.Struct) -> bytes:
    """Encode a message as a whole frame."""
    return framed(encode(message))


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message as the body of a frame, without the length."""
    return _encoder.encode(message)


def framed(body: bytes) -> bytes:
    """Put the length in front of a body."""
    return _HEADER.pack(len(body)) + body


def _body_length(header: bytes | bytearray, most: int = MAX_FRAME_BYTES) -> int:
    (length,) = _HEADER.unpack(header)
    if length > most:
        raise ProtocolError(f"a frame announced {length} bytes, more than the {most} that any message has")
    return int(length)


def decode(decoder: msgspec.msgpack.Decoder[Any], body: bytes) -> Any:
    """Decode the message in a frame's body.

    Raises:
        ProtocolError: the body is not a message of the decoder's type.
    """
    try:
        return decoder.decode(body)
    except (msgspec.DecodeError, ValueError) as error:
        raise ProtocolError(f"not a message: {error}") from None


def read_frame(sock: socket.socket, most: int = MAX_FRAME_BYTES) -> bytes | None:
    """Read the body of the next frame from a blocking socket; None if the other side has closed its end.

    Args:
        sock: the socket
        most: the bytes that a body may have; nothing of a longer one is read

    Raises:
        ProtocolError: the bytes are not a frame.
    """
    header = _read(sock, _HEADER.size)
    return None if header is None else _read(sock, _body_length(header, most))


def _read(sock: socket.socket, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        try:
            part = sock.recv(min(count - len(parts), 1 << 20))
        except (ConnectionResetError, TimeoutError):  # TimeoutError: the other host no longer answers
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)


class EngineEnd:
    """The engine's end of the socket. It blocks. At most one thread may read; any thread may write."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._writing = threading.Lock()

    def send(self, message: ToServer) -> None:
        """Write a message.

        Raises:
            OSError: the server is gone.
        """
        data = frame(message)
        with self._writing:
            self._sock.sendall(data)

    def receive(self) -> ToEngine | None:
        """Read the next message; None if the server has closed its end.

        Raises:
            ProtocolError: the bytes are not a message.
        """
        body = read_frame(self._sock)
        if body is None:
            return None
        message: ToEngine = decode(_to_engine, body)
        return message


class _Incoming(asyncio.Protocol):
    """Cuts the engine's bytes into messages as they arrive, and calls `hear` with each message at once.

    Every token of every stream comes through here, and beside a busy model each wake-up of a task takes about
    40 microseconds. So this class uses no task that waits for messages, and not asyncio's streams, whose reader
    wakes twice for each frame.
    """

    def __init__(self, hear: Callable[[ToServer], None]) -> None:
        self._hear = hear
        self._bytes = bytearray()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        """Handle the messages that `data` completes. The event loop calls it."""
        if self.closed.done():
            return
        self._bytes += data
        try:
            while (body := self._next_body()) is not None:
                self._hear(decode(_to_server, body))
        except Exception as error:
            self.closed.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Record the end of the stream. The event loop calls it."""
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
    """The server's end of the socket, for asyncio."""

    def __init__(self, transport: asyncio.WriteTransport, incoming: _Incoming) -> None:
        self._transport = transport
        self._incoming = incoming

    @classmethod
    async def over(cls, sock: socket.socket, hear: Callable[[ToServer], None]) -> ServerEnd:
        """Make the server's end from a connected AF_UNIX stream socket, which it then owns.

        Args:
            sock: the socket.
            hear: called on the event loop with each message.
        """
        loop = asyncio.get_running_loop()
        return cls(*await loop.create_unix_connection(lambda: _Incoming(hear), sock=sock))

    def send(self, message: ToEngine) -> None:
        """Queue a message for writing. Messages are few and small, so no caller waits until they are written."""
        if not self._transport.is_closing():
            self._transport.write(frame(message))

    async def wait_closed(self) -> None:
        """Return when the engine has closed its end. After an error no more messages are read.

        Raises:
            ProtocolError: the bytes are not a message.
            Exception: any error that `hear` raised.
        """
        await asyncio.shield(self._incoming.closed)

    def close(self) -> None:
        """Close the socket. The engine sees the end of the stream and exits."""
        self._transport.close()
