"""Where the server listens: an address or a Unix socket, with or without TLS. All of it is checked before a model is loaded."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from server.settings import Settings


class ServeError(Exception):
    """The server cannot run; the message says why."""


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Load a certificate and its key, to find a fault before anything else is done.

    Raises:
        ServeError: they cannot be used.
    """
    if certificate is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise ServeError(
            f"the certificate {certificate} cannot be used with the key {key or 'in the same file'}: "
            f"{getattr(error, 'strerror', None) or error}"
        ) from error


def _no_password() -> str:
    raise ValueError("it asks for a password; take a key without one")


@contextlib.contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Listen where the settings say.

    Raises:
        ServeError: the address is taken or cannot be used.
    """
    if settings.uds is None:
        with bind(settings.host, settings.port) as listener:
            yield listener
        return
    path = Path(settings.uds).expanduser()
    with bind_unix(path) as listener:
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def bind_unix(path: Path) -> socket.socket:
    """Listen on a Unix socket, which its owner and group may use. A socket that a dead process left is replaced.

    Raises:
        ServeError: the path is in use, or is another file, or cannot be used.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise ServeError(
                        f"another process listens on {path}; stop that one, or choose another with --uds"
                    )
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen()
    except OSError as error:
        listener.close()
        raise ServeError(f"cannot listen on {path}: {error.strerror or error}") from error
    except BaseException:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def bind(host: str, port: int) -> socket.socket:
    """Bind the address, before anything is loaded.

    Raises:
        ServeError: the address is taken, or does not belong to this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} of {host} is in use by another process; stop that one, or choose another with --port"
            ) from error
        raise ServeError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener
