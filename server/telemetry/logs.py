"""Logs: text lines for a person, or one JSON object a line for a collector. Each request has one access line.

All logs go to standard error. No line contains what clients send, except prompts if the operator asked for them.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from server.config import LogFormat
from server.telemetry.record import Ended
from server.telemetry.sink import LogSink, SinkHandler

_access = logging.getLogger("server.access")
_engine = logging.getLogger("engine.output")
_LAST_SECONDS = 1.0
_QUIET = ("/health/live", "/health/ready", "/metrics")
"""Probes and scrapers request these every few seconds. They get an access line only if the status is unexpected."""


def configure(log_format: LogFormat) -> LogSink:
    """Send every log record of this process to standard error, in one format. Returns where they go.

    No record waits for its reader. What is left at the end of the process gets a second to be written.
    """
    sink = LogSink(sys.stderr)
    atexit.register(sink.flush, _LAST_SECONDS)
    handler = SinkHandler(sink)
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter("%(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if log_format == "json" else logging.WARNING, force=True
    )
    logging.captureWarnings(capture=True)
    for name in ("httpx", "urllib3", "opentelemetry"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return sink


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object. `extra={"fields": {...}}` adds fields to the object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def engine_output(text: str) -> None:
    """Log what an engine process wrote to its standard output or error."""
    _engine.warning("%s", text)


class AccessLog:
    """Writes the access line of each request.

    Args:
        prompt_of: turns token ids into text; if given, prompts are logged too.
    """

    def __init__(self, prompt_of: Callable[[Sequence[int]], str] | None = None) -> None:
        self._prompt_of = prompt_of

    def __call__(self, ended: Ended) -> None:
        """Log a request that has ended."""
        if ended.endpoint in _QUIET and ended.status in (200, 503):
            return
        fields: dict[str, Any] = {
            "request_id": ended.request_id,
            "method": ended.method,
            "endpoint": ended.endpoint,
            "status": ended.status,
            "outcome": ended.outcome,
            "key": ended.key,
            "duration_seconds": round(ended.seconds, 6),
        }
        if (trace_id := _trace_id(ended.traceparent)) is not None:
            fields["trace_id"] = trace_id
        if (generation := ended.generation) is not None:
            choices = generation.choices.values()
            queued = [choice.queue_seconds for choice in choices if choice.queue_seconds is not None]
            first = generation.first_token
            fields |= {
                "model": generation.model,
                "stream": generation.stream,
                "top_k": generation.jobs[0].submit.index_top_k,
                "choices": len(choices),
                "prompt_tokens": sum(choice.prompt_tokens for choice in choices),
                "cached_tokens": sum(choice.cached_tokens for choice in choices),
                "completion_tokens": sum(choice.tokens for choice in choices),
                "finish_reasons": [choice.finish for choice in choices],
                "queue_seconds": round(max(queued), 6) if queued else None,
                "time_to_first_token_seconds": None if first is None else round(first - ended.started, 6),
            }
            if any(choice.repeated_tokens for choice in choices):
                fields["repeated_tokens"] = [choice.repeated_tokens for choice in choices]
            if self._prompt_of is not None:
                prompts = dict.fromkeys(job.submit.prompt_token_ids for job in generation.jobs)
                fields["prompts"] = [self._prompt_of(ids) for ids in prompts]
        _access.info("%s %s %s", ended.method, ended.endpoint, ended.status, extra={"fields": fields})


def _trace_id(traceparent: str | None) -> str | None:
    """The trace id of a well-formed W3C `traceparent`: version, trace, parent, flags, in hexadecimal."""
    parts = (traceparent or "").split("-")
    if len(parts) < 4 or len(parts[1]) != 32 or set(parts[1]) - set("0123456789abcdef"):
        return None
    return parts[1]
