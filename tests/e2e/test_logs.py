"""The logs of a real server whose engine dies: every line is JSON, and no line contains the prompt."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.serving import START_SECONDS, Server, until
from tests.server.telemetry.test_tracing import Receiver, values


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.mark.slow
def test_json_lines_and_a_trace_from_start_to_end(start: Callable[..., Server], receiver: Receiver) -> None:
    port = _free_port()
    server = start(
        "--log-format", "json", "--otlp-endpoint", receiver.url, "--max-model-len", "256", "--port", port
    )
    server.url = f"http://127.0.0.1:{port}"

    def lines() -> list[dict[str, Any]]:
        text = server.errors
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def said(message: str) -> bool:
        assert server.process.poll() is None, server.errors
        return any(message in line["message"] for line in lines())

    until(lambda: said(f"ready at {server.url}"), START_SECONDS)
    answer = server.post("/v1/completions", prompt="A heliotrope xylophone", max_tokens=3)
    assert answer.status_code == 200
    server.engine.kill()
    until(lambda: said("the engine is ready again"), START_SECONDS)
    assert server.end(signal.SIGTERM) == 0
    assert said_nothing_else(server)

    (access,) = (line for line in lines() if line["logger"] == "server.access")
    assert access["request_id"] == answer.headers["x-request-id"]
    assert access["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert any("signal 9" in line["message"] and line["level"] == "error" for line in lines())
    assert "heliotrope" not in server.errors
    names = sorted(span.name for span in receiver.spans)
    assert names == ["decode", "prefill", "queue", "text_completion smollm2-135m-instruct"]
    (root,) = (span for span in receiver.spans if span.name.startswith("text"))
    assert values(root)["dsa.request_id"] == access["request_id"]
    stages = sorted(
        (span for span in receiver.spans if span is not root), key=lambda s: s.start_time_unix_nano
    )
    assert [span.name for span in stages] == ["queue", "prefill", "decode"]
    assert root.start_time_unix_nano <= stages[0].start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano


def said_nothing_else(server: Server) -> bool:
    """Standard output has no greeting, because the greeting is one of the log lines."""
    server._reader.join(10)
    return server._said.get(timeout=10) == ""


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])
