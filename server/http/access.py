"""Lets in who has a key: every route but the probes asks for one, if the server has keys.

A route that is added later is closed, too, because only the open ones are listed.
"""

from __future__ import annotations

from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.access.keys import Caller, KeyBook, Role, unverified
from server.access.limits import Limits
from server.http.middleware import record_of
from server.http.protocol.errors import ApiError
from server.http.quota import quota_errors, standing_headers
from server.telemetry.metrics import Metrics

PROBES = frozenset(("/health", "/health/live", "/health/ready", "/ping"))
"""Who probes a server, such as a load balancer or the kubelet, has no key. These say nothing but how the server is."""

METRICS = "/metrics"
ADMIN = "/admin"
_CHALLENGE = 'Bearer realm="dsa-serve"'


def secret_of(headers: Headers) -> str | None:
    """The secret that a request brings: as OpenAI's clients send it, or as Anthropic's do."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key") or None


def caller_of(scope: Scope) -> Caller:
    """Who sent a request that was let in."""
    caller = record_of(scope).caller
    assert caller is not None
    return caller


class AccessMiddleware:
    """Finds out who calls, and answers 401 or 403 in place of the application if that caller may not.

    Args:
        app: what it guards.
        keys: the keys; None: everybody may use everything but the admin's routes.
        limits: how much each key may do at a time.
        metrics: count refusals.
        public_metrics: everybody may read /metrics.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyBook | None,
        limits: Limits,
        metrics: Metrics,
        public_metrics: bool = False,
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._metrics = metrics
        self._open = PROBES | ({METRICS} if public_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, path = record_of(scope), scope["path"]
        with ExitStack() as place:
            try:
                caller = record.caller = self._admit(path, secret_of(Headers(scope=scope)))
                if caller.record is not None and scope["method"] != "GET":  # to read costs nothing
                    with quota_errors():
                        try:
                            place.enter_context(self._limits.enter(caller.record))
                        finally:
                            record.headers.update(standing_headers(self._limits, caller.record))
            except ApiError as error:
                self._metrics.rejected(error.detail.code)
                if error.status in (401, 403) and scope["method"] != "GET":
                    error.headers["connection"] = "close"  # the body is not worth reading
                await error.to_response(path)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _admit(self, path: str, secret: str | None) -> Caller:
        admin = path == ADMIN or path.startswith(f"{ADMIN}/")
        if path in self._open:
            return Caller("probe")
        if self._keys is None:
            if admin:
                raise _forbidden(
                    "this server has no keys, so nobody can be its admin; start it with --keys FILE and make a key with "
                    "dsa keys new NAME --role admin"
                )
            return unverified(secret)
        if secret is None:
            raise _unauthorized(
                "no key was sent; send one as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            )
        record = self._keys.find(secret)
        if record is None:
            raise _unauthorized(
                "the key is not valid: it is unknown, expired or revoked", ', error="invalid_token"'
            )
        allowed: tuple[Role, ...] = ("admin",) if admin else ("user",)
        if path == METRICS:
            allowed = ("metrics", "admin")
        if record.role not in allowed:
            raise _forbidden(
                f"the key {record.name} has the role {record.role}, but this path needs {' or '.join(allowed)}"
            )
        return Caller(record.name, record)


def _unauthorized(message: str, problem: str = "") -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", headers={"www-authenticate": f"{_CHALLENGE}{problem}"}
    )


def _forbidden(message: str) -> ApiError:
    return ApiError(403, message, kind="permission_error", code="forbidden")
