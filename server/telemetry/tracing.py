"""Traces for OpenTelemetry. Only this module uses its libraries, and loads them only if an endpoint is set.

A generating request has one trace. Its server span has the name and the attributes of the GenAI semantic
conventions (https://github.com/open-telemetry/semantic-conventions-genai). Below it each choice has the spans
`queue`, `prefill` and `decode`, with the times that the engine measured. Spans are made after the request has ended,
so they do not slow it down. The SDK's own OTEL_* variables (service name, resource, headers, sampler) apply.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from server.telemetry.record import Ended, GenerationRecord

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

_EXPORT_SECONDS = 5.0  # time limit of one export with its retries, and so of `close`
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}
"""The endpoints that generate -> the conventions' name of their operation."""


class TracingError(ValueError):
    """Traces cannot be exported; the message says why."""


def check_endpoint(endpoint: str) -> None:
    """Find out at start whether traces can be exported.

    Raises:
        TracingError: the address is not an HTTP address, or the libraries are missing.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TracingError(
            f"--otlp-endpoint is {endpoint!r}; expected the address of an OTLP/HTTP receiver, such as "
            "http://localhost:4318"
        )
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        found = False
    if not found or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise TracingError(
            "--otlp-endpoint needs OpenTelemetry, which is not installed; install dsa-serve with its extra "
            "'otel', or leave the flag out"
        )


class Tracing:
    """Exports traces to one OTLP/HTTP receiver.

    Args:
        endpoint: the receiver's base address; `/v1/traces` is appended if it is missing.
    """

    def __init__(self, endpoint: str) -> None:
        check_endpoint(endpoint)
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        base = endpoint.rstrip("/")
        url = base if base.endswith("/v1/traces") else f"{base}/v1/traces"
        # The environment (OTEL_SERVICE_NAME) overrides this default name.
        resource = Resource({SERVICE_NAME: "dsa-serve"}).merge(Resource.create())
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "dsa-serve"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=_EXPORT_SECONDS))
        )
        self._tracer: Tracer = self._provider.get_tracer("dsa-serve")

    def close(self) -> None:
        """Export the remaining spans. Blocks for at most a few seconds."""
        self._provider.shutdown()

    def __call__(self, ended: Ended) -> None:
        """Trace a request that has ended. Only requests that generate are traced."""
        operation = _OPERATIONS.get(ended.endpoint)
        if operation is None or ended.method != "POST":
            return
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {"traceparent": ended.traceparent, "tracestate": ended.tracestate}
        parent = TraceContextTextMapPropagator().extract({k: v for k, v in carrier.items() if v is not None})
        generation = ended.generation
        root = self._tracer.start_span(
            f"{operation} {generation.model}" if generation else operation,
            context=parent,
            kind=SpanKind.SERVER,
            start_time=ended.started_ns,
            attributes=_attributes(ended, operation),
        )
        failed = ended.outcome not in ("stop", "length", "tool_calls", "ok")
        if failed:
            root.set_attribute("error.type", ended.outcome)
            if ended.outcome != "client_error":  # by the conventions a 4xx is not an error of a server span
                root.set_status(Status(StatusCode.ERROR, ended.outcome))
        if generation is not None and root.is_recording():
            context = set_span_in_context(root)
            for name, start, end, attributes in _stages(ended, generation):
                span = self._tracer.start_span(
                    name, context=context, start_time=_at(ended, start), attributes=attributes
                )
                span.end(_at(ended, end))
        root.end(_at(ended, ended.started + ended.seconds))


def _at(ended: Ended, moment: float) -> int:
    """Convert a moment of the monotonic clock (seconds) into nanoseconds since 1970."""
    return ended.started_ns + round((moment - ended.started) * 1e9)


def _attributes(ended: Ended, operation: str) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "dsa-serve",
        "http.request.method": ended.method,
        "http.route": ended.endpoint,
        "dsa.request_id": ended.request_id,
    }
    if ended.status is not None:
        attributes["http.response.status_code"] = ended.status
    if (generation := ended.generation) is None:
        return attributes
    sampling = generation.jobs[0].submit.sampling
    index_top_k = generation.jobs[0].submit.index_top_k
    choices = generation.choices.values()
    attributes |= {
        "gen_ai.request.model": generation.model,
        "gen_ai.response.model": generation.model,
        "gen_ai.request.stream": generation.stream,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.usage.input_tokens": sum(choice.prompt_tokens for choice in choices),
        "gen_ai.usage.output_tokens": sum(choice.tokens for choice in choices),
        "gen_ai.usage.cache_read.input_tokens": sum(choice.cached_tokens for choice in choices),
        "gen_ai.response.finish_reasons": [choice.finish for choice in choices if choice.finish],
        "dsa.top_k": "dense" if index_top_k is None else str(index_top_k),
    }
    if len(choices) > 1:
        attributes["gen_ai.request.choice.count"] = len(choices)
    if generation.first_token is not None:
        attributes["gen_ai.response.time_to_first_chunk"] = generation.first_token - ended.started
    return attributes


def _stages(ended: Ended, generation: GenerationRecord) -> list[tuple[str, float, float, dict[str, int]]]:
    """Name, start, end and attributes of every stage that a choice reached."""
    stages: list[tuple[str, float, float, dict[str, int]]] = []
    for index, choice in generation.choices.items():
        if choice.queue_seconds is None or choice.prefill_seconds is None:
            continue  # the choice ended before its first token, so its stages are not known
        of = {"dsa.choice": index}
        admitted = generation.submitted + choice.queue_seconds
        first = admitted + choice.prefill_seconds
        end = max(ended.started + ended.seconds if choice.ended is None else choice.ended, first)
        stages.append(("queue", generation.submitted, admitted, of))
        stages.append(("prefill", admitted, first, of | {"gen_ai.usage.input_tokens": choice.prompt_tokens}))
        stages.append(("decode", first, end, of | {"gen_ai.usage.output_tokens": choice.tokens}))
    return stages
