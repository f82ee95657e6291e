"""The config of the HTTP side. `server.settings.Settings` makes it, and it never changes."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
SomeSeconds = Annotated[float, msgspec.Meta(gt=0)]
Sparsity = Positive | Literal["dense"]
LogFormat = Literal["text", "json"]
SamplingSource = Literal["model", "openai"]
UnknownFields = Literal["accept", "refuse"]
ReasoningField = Literal["reasoning_content", "reasoning"]


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """How a token is chosen where a request does not say it. The values here are OpenAI's: they change nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: of all
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of the HTTP side.

    Attributes:
        model_name: what clients call the model.
        model_aliases: other names that clients may call it by; answers have `model_name`.
        host: the address to listen on.
        port: the port to listen on; 0: any free port.
        max_queue: requests that may be in work or waiting before new ones are refused.
        min_priority: the earliest place that a request may ask for; lower is earlier.
        max_queue_tokens: tokens of prompts that may wait to be computed before new requests are refused; None: any number.
        max_queue_seconds: how long nearly all may wait for a first token before new requests are refused; None: any time.
        request_seconds: how long a request may take from its arrival; 0: no limit.
        default_max_tokens: a request's token limit if it names none; None: up to the end of the context.
        default_top_k: a request's sparsity if it names none; None: the number that the indexer was trained for.
        max_body_bytes: the largest request body.
        hang_seconds: an engine that makes no progress for so long is replaced; 0: never.
        canary_interval: seconds between two runs of the canary; 0: it never runs.
        client_seconds: how long a client may take for its headers, or do nothing in the middle of a body or an answer.
        drain_seconds: how long running requests may go on after the signal to stop.
        max_n: the most choices of one request.
        max_prompts: the most prompts of one request.
        max_logprobs: the most alternatives of a log-probability; -1: the whole vocabulary.
        log_format: lines for a person, or JSON with an access line for each request.
        log_prompts: whether access lines have the prompts.
        otlp_endpoint: where traces go; None: nowhere.
        unknown_fields: what becomes of a field that an endpoint does not know.
        sampling: how a token is chosen where a request does not say it.
        enable_force_include_usage: every stream ends with its usage.
        return_tokens_as_token_ids: log-probabilities always name tokens by their ids.
        reasoning_field: the field of a chat's answers that has the reasoning.
        thinking_budget: after so many tokens the server ends the reasoning of a request without a budget; None: never.
        keys: the file of callers' keys; None: everybody is let in.
        public_metrics: /metrics needs no key.
        allowed_hosts: names that clients may call the server by: `auto`, `*`, or a list with commas.
        ssl_certfile: the certificate chain, PEM; None: no TLS.
        ssl_keyfile: its private key, PEM.
        uds: the path of a Unix socket to listen on, in place of host and port; None: there is none.
        max_connections: clients that may be connected at once.
        allow_origins: pages of which origins may use the server from a browser: `none`, `*`, or a list with commas.
    """

    model_name: str
    model_aliases: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: Port = 8000
    max_queue: Positive = 256
    max_queue_tokens: Positive | None = None
    max_queue_seconds: SomeSeconds | None = None
    request_seconds: Seconds = 0.0
    min_priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=0)] = 0
    default_max_tokens: Positive | None = 1024  # a small model at temperature 1 may never stop by itself
    default_top_k: Sparsity | None = None
    max_body_bytes: Positive = 8 << 20
    hang_seconds: Seconds = 30.0
    canary_interval: Seconds = 0.0
    client_seconds: SomeSeconds = 30.0
    drain_seconds: Seconds = 30.0
    max_n: Positive = 8
    max_prompts: Positive = 64
    max_logprobs: Annotated[int, msgspec.Meta(ge=-1)] = 20
    log_format: LogFormat = "text"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    prices: str | None = None  # a YAML file; None: the table in the package
    machine_price: str | None = None  # USD for an hour of the device; None: the table's price
    unknown_fields: UnknownFields = "accept"
    keys: str | None = None
    public_metrics: bool = False
    enable_force_include_usage: bool = False
    return_tokens_as_token_ids: bool = False
    reasoning_field: ReasoningField = "reasoning_content"
    thinking_budget: Positive | None = None
    allowed_hosts: str = "auto"
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    uds: str | None = None
    max_connections: Positive = 4096
    allow_origins: str = "none"
    sampling: SamplingDefaults = SamplingDefaults()
    stored_responses: int = 1000  # of /v1/responses, in memory; at most 64 MiB of them
    ledger: str | None = None  # a SQLAlchemy URL or a SQLite file; None: no ledger

    @property
    def model_names(self) -> tuple[str, ...]:
        """Every name that clients may call the model by; the first is the one in answers."""
        return self.model_name, *self.model_aliases
