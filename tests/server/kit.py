"""Parts for tests of the app: a small real tokenizer, a plain chat format, clients of several kinds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from engine.protocol import SamplingParams, Submit
from server.app import create_app
from server.chat import ChatFormat, PromptError
from server.config import ServerConfig
from server.http.connection import connections
from server.text.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine, Script

MODEL = "fake-model"


def make_tokenizer() -> Tokenizer:
    """A tokenizer with one token for each byte, and three control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|bos|>", "<|eos|>", "<|user|>")]
    )
    return Tokenizer(backend, eos_token_ids=[257], bos_token_id=256, adds_bos=True)


TEXT = make_tokenizer()
BOS, EOS = 256, 257


def ids(text: str) -> list[int]:
    return TEXT.encode(text, add_bos=False)


def say(text: str, *, end: bool = True, **script: Any) -> Script:
    return Script(token_ids=[*ids(text), *([EOS] if end else [])], **script)


class PlainChat(ChatFormat):
    """Writes each message after a control token."""

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        if messages[0]["role"] == "assistant":
            raise PromptError("the conversation must not begin with the assistant")
        return "<|bos|>" + "".join(f"<|user|>{message['content']}" for message in messages)


def make_config(**changes: Any) -> ServerConfig:
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "model_name": MODEL,
        "allowed_hosts": "*",
        "max_queue": 32,
        "default_max_tokens": None,
        "default_top_k": None,
        "max_body_bytes": 1 << 16,
        "drain_seconds": 1.0,
        "max_n": 8,
        "max_prompts": 16,
    }
    return ServerConfig(**(values | changes))


def make_app(engine: FakeEngine, **config: Any) -> FastAPI:
    return create_app(make_config(**config), engine, TEXT, PlainChat())


def speaking(text: str = "hello", **script: Any) -> FakeEngine:
    """An engine that gives the same answer to every request."""
    return FakeEngine(lambda submit: say(text, **script))


def client(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def chat_body(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion_body(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


@contextlib.asynccontextmanager
async def serving(
    app: FastAPI, *, buffer: int | None = None, seconds: float = 30, limit: int = 4096
) -> AsyncGenerator[str, None]:
    """Run the app on a real server; yields its address.

    The system keeps about `buffer` bytes for slow readers; clients may do nothing for `seconds`; `limit` may be connected.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)  # the connections inherit it
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="warning", timeout_graceful_shutdown=1, http=connections(seconds, limit)
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()


def submit(prompt: Sequence[int] = (1, 2), **changes: Any) -> Submit:
    values: dict[str, Any] = {"max_tokens": 100, "seed": 1, "stop_token_ids": (EOS,)}
    sampling = SamplingParams(**(values | changes))
    return Submit(request_id="r", prompt_token_ids=tuple(prompt), sampling=sampling, index_top_k=None)


def error_of(response: httpx.Response, status: int, code: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in error["message"]
    if code is not None:
        assert error["code"] == code, error
    return error


def events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    data = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
