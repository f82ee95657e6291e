"""Asks a server over HTTP for log-probabilities and continuations, dense or at a given top_k."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

import httpx

from lab.tool import ToolError

TopKSetting = int | Literal["dense"]
PartProgress = Callable[[int, int], None]
"""Callback (done, total): how many items of a part are done, and how many there are."""

T = TypeVar("T")
R = TypeVar("R")

_TIMEOUT = httpx.Timeout(connect=10, read=3600, write=60, pool=None)
_TRIES = 4
_WAIT_SECONDS = 5.0
_INFO = re.compile(r"^dsa_model_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class EvaluationError(ToolError):
    """The measurement is not possible; the message is one sentence that says why and what to do."""


class Client:
    """A client of a server and of its first model.

    Attributes:
        model: the model's name.
        max_model_len: how many tokens prompt and answer may have together.
        info: the labels of the server's metric `dsa_model_info` (device, dtype, indexer, ...); may be empty.
        repeated: how many requests were sent again, after a refusal or a broken connection.

    Every request raises EvaluationError if the server refuses it, cannot be reached, or uses another top_k.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        max_model_len: int,
        info: dict[str, str] | None = None,
        *,
        wait_seconds: float = _WAIT_SECONDS,
    ) -> None:
        self._http = http
        self._wait_seconds = wait_seconds
        self.model = model
        self.max_model_len = max_model_len
        self.info = info or {}
        self.repeated = 0

    async def raw(self, ids: Sequence[int], index_top_k: TopKSetting, max_tokens: int) -> dict[str, Any]:
        """Return a whole choice, with log-probabilities of prompt and answer. It does not stop at the end of the turn."""
        body = {
            "prompt": list(ids),
            "echo": True,
            "logprobs": 1,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await self._choice("/v1/completions", index_top_k, body)

    async def _choice(self, path: str, index_top_k: TopKSetting, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._post(path, index_top_k, body)
        choice: dict[str, Any] = answer["choices"][0]
        return choice

    async def _post(self, path: str, index_top_k: TopKSetting, body: dict[str, Any]) -> dict[str, Any]:
        body = {"model": self.model, "dsa": {"top_k": index_top_k}} | body
        for left in reversed(range(_TRIES)):
            try:
                response = await self._http.post(path, json=body)
            except httpx.TransportError as error:
                problem = f"the server went away ({error or type(error).__name__})"
            else:
                if response.is_success:
                    return _checked(response, index_top_k)
                problem = reason(response)
                if response.status_code not in (429, 503):
                    raise EvaluationError(f"the server refused a request: {problem}")
            if left:
                self.repeated += 1
                await asyncio.sleep(self._wait_seconds)
        raise EvaluationError(f"{problem}; {_TRIES} tries were made")


def _checked(response: httpx.Response, index_top_k: TopKSetting) -> dict[str, Any]:
    """Return the answer's body.

    Raises:
        EvaluationError: attention ran with another top_k than `index_top_k`.
    """
    answer: dict[str, Any] = response.json()
    used = answer["usage"]["dsa"]["top_k"]
    if used != index_top_k:
        raise EvaluationError(
            f"the server ran with top_k {used} where {index_top_k} was asked for: its model has no trained indexer; "
            "serve one with --overlay"
        )
    return answer


def reason(response: httpx.Response) -> str:
    """Return the message of a refusal."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the answer was {response.status_code} {response.reason_phrase}"


@asynccontextmanager
async def connect(url: str, concurrency: int) -> AsyncGenerator[Client, None]:
    """Connect to the server at `url`, with room for `concurrency` requests at once.

    Raises:
        EvaluationError: no dsa server answers at `url`, or it is not ready.
    """
    limits = httpx.Limits(max_connections=concurrency + 1)
    async with httpx.AsyncClient(base_url=url, timeout=_TIMEOUT, limits=limits, trust_env=False) as http:
        try:
            ready = await http.get("/health/ready")
            model = (await http.get("/v1/models")).json()["data"][0]
            name, length = str(model["id"]), model["max_model_len"]
            metrics = (await http.get("/metrics")).text
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EvaluationError(
                f"there is no server at {url} ({error}); leave out --url to have one started"
            ) from None
        except (ValueError, LookupError, TypeError):
            raise EvaluationError(f"what answers at {url} is not a dsa server") from None
        if ready.is_error or length is None:
            raise EvaluationError(f"the server at {url} is not ready; wait until its /health/ready says so")
        found = _INFO.search(metrics)
        yield Client(http, name, int(length), dict(_LABEL.findall(found[1])) if found else {})


async def each(
    items: Sequence[T], work: Callable[[T], Awaitable[R]], concurrency: int, progress: PartProgress
) -> list[R]:
    """Do `work` on all items, `concurrency` at a time; return the results in the items' order.

    Raises:
        EvaluationError: the first failure. It stops the other items.
    """
    gate, done = asyncio.Semaphore(concurrency), 0
    progress(0, len(items))

    async def one(item: T) -> R:
        nonlocal done
        async with gate:
            result = await work(item)
        done += 1
        progress(done, len(items))
        return result

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except* EvaluationError as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
