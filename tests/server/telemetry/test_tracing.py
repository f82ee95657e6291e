"""Traces, as an OTLP/HTTP receiver reads them."""

from __future__ import annotations

import http.server
import importlib.util
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from server.config import SettingsError, load_settings
from tests.server.kit import chat_body, client, completion_body, make_app, speaking

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Receiver:
    """Takes POST /v1/traces and keeps the spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.paths: list[str] = []
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.paths.append(self.path)
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    receiver.services.add(values(resource.resource)["service.name"])
                    for scope in resource.scope_spans:
                        receiver.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def values(thing: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        return (
            [value(item) for item in any_value.array_value.values]
            if kind == "array_value"
            else getattr(any_value, kind)
        )

    return {pair.key: value(pair.value) for pair in thing.attributes}


async def ask(
    receiver: Receiver, engine: Any, *requests: tuple[str, dict[str, Any], dict[str, str]]
) -> list[Any]:
    app = make_app(engine, otlp_endpoint=receiver.url)
    async with app.router.lifespan_context(app), client(app) as http:
        answers = [await http.post(path, json=body, headers=headers) for path, body, headers in requests]
        await http.get("/metrics")
    return answers


async def test_one_trace_with_its_stages(receiver: Receiver) -> None:
    before = time.time_ns()
    (answer,) = await ask(
        receiver,
        speaking("hello", cached=1),
        ("/v1/chat/completions", chat_body(max_tokens=9), {"traceparent": f"00-{TRACE}-{PARENT}-01"}),
    )
    assert receiver.paths == ["/v1/traces"]
    assert receiver.services == {"dsa-serve"}
    spans = {span.name: span for span in receiver.spans}
    assert set(spans) == {"chat fake-model", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    root = spans["chat fake-model"]
    assert root.parent_span_id.hex() == PARENT
    assert root.kind == root.SPAN_KIND_SERVER
    usage = answer.json()["usage"]
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "dsa-serve",
        "gen_ai.request.model": "fake-model", "gen_ai.response.model": "fake-model",
        "gen_ai.request.max_tokens": 9, "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"], "gen_ai.usage.output_tokens": 6,
        "gen_ai.usage.cache_read.input_tokens": 1, "http.route": "/v1/chat/completions",
        "http.response.status_code": 200, "dsa.request_id": answer.headers["x-request-id"],
    }  # fmt: skip
    attributes = values(root)
    assert {name: attributes[name] for name in expected} == expected
    assert "error.type" not in attributes
    queue, prefill, decode = (spans[name] for name in ("queue", "prefill", "decode"))
    for span in (queue, prefill, decode):
        assert span.parent_span_id == root.span_id
        assert values(span)["dsa.choice"] == 0
    assert before <= root.start_time_unix_nano <= queue.start_time_unix_nano
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(1_000_000, abs=1000)


async def test_every_choice_has_its_stages_and_every_failure_its_reason(receiver: Receiver) -> None:
    requests = [
        ("/v1/completions", completion_body(n=2), {}),
        ("/v1/chat/completions", {}, {}),
        ("/v1/chat/completions", chat_body(), {"traceparent": f"00-{TRACE}-{PARENT}-00"}),  # not sampled
    ]
    await ask(receiver, speaking("hello"), *requests)
    names = sorted(span.name for span in receiver.spans)
    assert names == [
        "chat",
        "decode",
        "decode",
        "prefill",
        "prefill",
        "queue",
        "queue",
        "text_completion fake-model",
    ]
    (refused,) = (span for span in receiver.spans if span.name == "chat")
    assert values(refused)["error.type"] == "client_error"
    assert values(refused)["http.response.status_code"] == 400


async def test_a_request_that_the_engine_could_not_finish(receiver: Receiver) -> None:
    await ask(
        receiver,
        speaking("hello", fault="die", fault_after=2),
        ("/v1/completions", completion_body(stream=True), {}),
    )
    spans = {span.name: span for span in receiver.spans}
    root = spans["text_completion fake-model"]
    assert root.status.code == root.status.STATUS_CODE_ERROR
    assert values(root)["error.type"] == "unavailable"
    assert values(root)["gen_ai.usage.output_tokens"] == 2


async def test_no_receiver_holds_nothing_up() -> None:
    app = make_app(speaking(), otlp_endpoint="http://127.0.0.1:9")
    async with app.router.lifespan_context(app), client(app) as http:
        assert (await http.post("/v1/completions", json=completion_body())).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 10


def test_an_address_that_is_none() -> None:
    with pytest.raises(SettingsError, match="such as http://localhost:4318"):
        load_settings({"otlp_endpoint": "localhost:4318"}, {})


def test_libraries_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="install dsa-serve with its extra 'otel'"):
        load_settings({"otlp_endpoint": "http://localhost:4318"}, {})


def test_off_by_default() -> None:
    assert load_settings({}, {}).server("x").otlp_endpoint is None
