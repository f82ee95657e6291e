"""Which names a client may call this server by: its `Host` header.

A page from anywhere can have its own name point at 127.0.0.1 and then read what a server there answers, because the browser
believes that both are one site (DNS rebinding). It cannot choose what stands in `Host`: that is the page's own name. So
a server for this machine only, without keys, takes no names that may be a stranger's.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.http.access import PROBES
from server.http.protocol.errors import ApiError

ANY = "*"
AUTO = "auto"
_OWN = ("localhost", "host.docker.internal")


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def name_of(host: str) -> str:
    """The name in a Host header, without its port, in small letters; of an address of IPv6 without its brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name, colon, port = host.rpartition(":")
    return (name if colon and (port.isdecimal() or not port) else host).rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def allowed_hosts(allowed: str, *, host: str, guarded: bool) -> Callable[[str], bool] | None:
    """Return what says whether a name may be used; None: every name may.

    Args:
        allowed: `auto`, `*`, or names with commas; `*.example.com` is every name under example.com.
        host: the address that the server listens on.
        guarded: the server asks for keys, or listens on a socket that browsers cannot reach. Then `auto` is `*`.
    """
    if allowed == ANY or (allowed == AUTO and (guarded or not is_local(host))):
        return None
    if allowed == AUTO:
        own = {*_OWN, host.lower(), socket.gethostname().lower()}
        return lambda name: name in own or name.endswith(".localhost") or _is_address(name)
    names = [name.strip().lower() for name in allowed.split(",") if name.strip()]
    exact = {name for name in names if not name.startswith("*.")}
    ends = tuple(name[1:] for name in names if name.startswith("*."))
    return lambda name: name in exact or (bool(ends) and name.endswith(ends))


class HostMiddleware:
    """Answers 400 to a request under a name that is not this server's. Probes may call it anything."""

    def __init__(self, app: ASGIApp, *, is_allowed: Callable[[str], bool]) -> None:
        self._app = app
        self._is_allowed = is_allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            name = name_of(Headers(scope=scope).get("host", ""))
            if not self._is_allowed(name):
                shown = name[:128] if name.isprintable() else "that"
                error = ApiError(
                    400,
                    f"this server is not called {shown!r}; the operator can allow a name with --allowed-hosts",
                    code="host_not_allowed",
                )
                await error.to_response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)
