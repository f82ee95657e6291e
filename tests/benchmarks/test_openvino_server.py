"""OpenVINO's server as `dsa bench` asks it, with a pipeline that makes numbers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.openvino_server import serve
from lab.bench.endpoint import connect


class Counting:
    """Continues a prompt by counting on from its last token, two tokens at a time at first."""

    def answer(self, prompt: list[int], max_tokens: int, say: Any) -> None:
        tokens = [prompt[-1] + 1 + i for i in range(max_tokens)]
        say(tokens[:2])
        for token in tokens[2:]:
            say([token])


@pytest.fixture
def url() -> Iterator[str]:
    server = serve(Counting(), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_the_bench_reads_its_answers(url: str) -> None:
    async with connect("OpenVINO", url) as endpoint:
        await endpoint.greet()
        assert endpoint.model == "openvino"
        for length in (3, 5):
            timing = await endpoint.complete(list(range(length)), 7)
            assert (timing.prompt_tokens, timing.completion_tokens, len(timing.arrivals)) == (length, 7, 7)


def test_what_is_not_there_is_refused(url: str) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "text", "max_tokens": 1, "stream": True}),
        ("/v1/chat/completions", {}),
    ):
        answer = httpx.post(url + path, json=body)
        assert answer.status_code == 400
        assert "token ids" in answer.json()["error"]["message"]
