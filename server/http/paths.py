"""Forgives paths and methods: a slash at the end, a base URL without or with a second /v1, HEAD for GET.

So a client works with either base URL, `http://host:8000` or `http://host:8000/v1`.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

_UNDER_V1 = ("/chat/completions", "/completions", "/models", "/responses", "/messages")
_AT_ROOT = (
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/health",
    "/version",
    "/ping",
    "/load",
    "/metrics",
)


def canonical(path: str) -> str:
    """The path of the endpoint that a path means. A path that means none is returned without its last slash."""
    if len(path) > 1 and path.endswith("/"):
        path = path.rstrip("/") or "/"
    if path.startswith("/v1/v1/"):
        path = path[3:]
    if _is_under(path, _UNDER_V1):
        return "/v1" + path
    if path.startswith("/v1/") and _is_under(path[3:], _AT_ROOT):
        return path[3:]
    return path


def _is_under(path: str, names: tuple[str, ...]) -> bool:
    return any(path == name or path.startswith(name + "/") for name in names)


class PathMiddleware:
    """Gives each request its canonical path, and answers HEAD as GET without a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            path = canonical(scope["path"])
            # The HTTP server keeps its own scope, whose method tells it to send no body.
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            if path != scope["path"] or method != scope["method"]:
                scope = {**scope, "path": path, "raw_path": path.encode("utf-8", "replace"), "method": method}
        await self._app(scope, receive, send)
