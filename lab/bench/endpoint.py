"""A client of one server with OpenAI's interface. It streams completions and notes the times of their events."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from lab.bench.errors import BenchError
from lab.bench.timing import Timing

_TIMEOUT = httpx.Timeout(connect=10, read=1800, write=60, pool=None)
_CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class NotYetError(Exception):
    """The server does not answer, or answers that it is not ready."""


class Endpoint:
    """A server.

    Attributes:
        name: its name in tables.
        url: its address, without /v1.
        model: the name of its first model, which the requests use.
        about: the first model's entry of /v1/models, and the header `server`.
    """

    def __init__(self, http: httpx.AsyncClient, name: str, url: str, fields: dict[str, Any]) -> None:
        self._http = http
        self._fields = fields
        self.name = name
        self.url = url
        self.model = ""
        self.about: dict[str, Any] = {}

    async def greet(self) -> None:
        """Ask the server for its model; sets `model` and `about`.

        Raises:
            NotYetError: nothing answers, or the server is still loading.
            BenchError: the server does not have OpenAI's interface.
        """
        try:
            response = await self._http.get("/v1/models")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise NotYetError(f"there is no server at {self.url} ({error or type(error).__name__})") from None
        if response.status_code == 503:
            raise NotYetError(
                f"the server at {self.url} is not ready: {_reason(response.status_code, response.content)}"
            )
        try:
            model = response.raise_for_status().json()["data"][0]
            self.model = str(model["id"])
        except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
            raise BenchError(
                f"what answers at {self.url} names no model at /v1/models; expected a server with OpenAI's interface"
            ) from None
        self.about = {"model": model, "server": response.headers.get("server")}

    async def complete(self, prompt: Sequence[int] | str, max_tokens: int) -> Timing:
        """Let the server continue a prompt, greedily and past the end of the text.

        Args:
            prompt: token ids, or text
            max_tokens: tokens of the answer

        Raises:
            NotYetError: nothing answers, or the server answers 503.
            BenchError: the server refused, broke off, did not stream, or did not make `max_tokens` tokens.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | self._fields
        body = {name: value for name, value in body.items() if value is not None}
        lines: list[tuple[float, str]] = []
        sent = time.perf_counter()
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as response:
                if not response.is_success:
                    reason = _reason(response.status_code, await response.aread())
                    if response.status_code == 503:
                        raise NotYetError(f"the server at {self.url} is not ready: {reason}")
                    raise BenchError(f"{self.name} refused a request: {reason}")
                kind = response.headers.get("content-type", "nothing")
                if not kind.startswith("text/event-stream"):
                    raise BenchError(
                        f"{self.name} did not stream: it answered with {kind}, and times of tokens need text/event-stream"
                    )
                async for line in response.aiter_lines():  # parsed later: here every microsecond counts
                    lines.append((time.perf_counter(), line))  # noqa: PERF401 - the clock is read at once
        except httpx.ConnectError as error:
            raise NotYetError(f"there is no server at {self.url} ({error})") from None
        except httpx.TransportError as error:
            raise BenchError(
                f"{self.name} broke off an answer ({error or type(error).__name__}); see what it says of itself"
            ) from None
        return self._read(sent, lines, max_tokens)

    def _read(self, sent: float, lines: Sequence[tuple[float, str]], max_tokens: int) -> Timing:
        """Parse the lines of an event stream, each with the time when it came."""
        arrivals: list[float] = []
        ended: float | None = None
        usage: dict[str, Any] | None = None
        for came, line in lines:
            if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                continue
            try:
                event = json.loads(data)
                if "error" in event:
                    raise BenchError(f"{self.name} ended an answer with an error: {_message(event)}")
                for choice in event.get("choices", ()):
                    if choice.get("text"):
                        arrivals.append(came)
                    if choice.get("finish_reason"):
                        ended = came
                usage = event.get("usage") or usage
            except (ValueError, AttributeError, TypeError):
                raise BenchError(
                    f"{self.name} sent an event that is not a completion's: {data[:80]}"
                ) from None
        if ended is None:
            raise BenchError(
                f"{self.name} ended an answer without a finish reason; see what it says of itself"
            )
        if usage is None:
            raise BenchError(
                f"{self.name} did not count its tokens; it must know stream_options.include_usage"
            )
        made = int(usage["completion_tokens"])
        if made != max_tokens:
            raise BenchError(
                f"{self.name} made {made} tokens where {max_tokens} were asked for; it must know ignore_eos, "
                f"or another field that --fields '{self.name}={{...}}' names"
            )
        details = usage.get("prompt_tokens_details") or {}
        return Timing(
            sent=sent,
            arrivals=tuple(arrivals),
            ended=ended,
            prompt_tokens=int(usage["prompt_tokens"]),
            completion_tokens=made,
            cached_tokens=details.get("cached_tokens"),
        )


@asynccontextmanager
async def connect(
    name: str, url: str, fields: dict[str, Any] | None = None
) -> AsyncGenerator[Endpoint, None]:
    """Make an endpoint, and close its connections at the end. It sends the key in $DSA_API_KEY, if one is there.

    Args:
        name: its name in tables
        url: the server's address, with or without /v1
        fields: more fields for every request's body; a field whose value is None is left out
    """
    base = url.rstrip("/").removesuffix("/v1")
    key = os.environ.get("DSA_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(
        base_url=base, timeout=_TIMEOUT, limits=_CONNECTIONS, trust_env=False, headers=headers
    ) as http:
        yield Endpoint(http, name, base, fields or {})


def _reason(status: int, content: bytes) -> str:
    """Return the message of a refusal."""
    try:
        return _message(json.loads(content))
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"the answer was {status}"


def _message(event: dict[str, Any]) -> str:
    error = event["error"] if "error" in event else event["detail"]
    return str(error["message"] if isinstance(error, dict) else error)
