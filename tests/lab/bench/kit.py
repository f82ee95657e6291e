"""A fake server with OpenAI's streaming interface, with times or faults that the test chooses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


class Told:
    """The behaviour that the test chooses.

    Attributes:
        first: seconds from a request to its first token.
        cached: the same for a prompt whose beginning the server has seen.
        gap: seconds between tokens.
        fault: the name of a fault; empty for none.
        bodies: the bodies of the requests so far.
    """

    def __init__(
        self, *, first: float = 0.0, cached: float | None = None, gap: float = 0.0, fault: str = ""
    ) -> None:
        self.first = first
        self.cached = first if cached is None else cached
        self.gap = gap
        self.fault = fault
        self.bodies: list[dict[str, Any]] = []
        self._seen: set[tuple[int, ...]] = set()

    def app(self) -> FastAPI:
        app = FastAPI()
        app.get("/v1/models")(self._models)
        app.post("/v1/completions")(self._complete)
        return app

    async def _models(self) -> Response:
        if self.fault == "no models":
            return JSONResponse({"hello": "world"})
        return JSONResponse({"data": [{"id": "told"}]})

    async def _complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if self.fault == "loading":
            return JSONResponse({"error": {"message": "loading the model"}}, 503)
        if body["model"] != "told":
            return JSONResponse({"error": {"message": f"there is no model {body['model']!r}"}}, 404)
        if self.fault == "whole":
            return JSONResponse({"choices": [{"text": "all at once"}]})
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        prompt, tokens = body["prompt"], body["max_tokens"]
        begin = tuple(prompt[:8])
        await asyncio.sleep(self.cached if begin in self._seen else self.first)
        self._seen.add(begin)
        if self.fault == "error":
            yield event({"error": {"message": "out of pages"}})
            return
        made = tokens - 1 if self.fault == "short" else tokens
        yield ": a comment\n\n"
        for i in range(made):
            if i:
                await asyncio.sleep(self.gap)
            finish = "length" if i == made - 1 and self.fault != "endless" else None
            yield event({"choices": [{"text": " word", "finish_reason": finish}]})
        count = len(prompt) + (1 if self.fault == "other tokenizer" else 0)
        if self.fault != "no usage":
            yield event({"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": made}})
        yield "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
