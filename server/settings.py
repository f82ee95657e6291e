"""The settings of `dsa serve`: read once from flags, environment and file, checked, and frozen.

A flag wins over `DSA_<NAME>` in the environment, which wins over the file, which wins over the default. All three have
the same name: `--max-queue`, `DSA_MAX_QUEUE`, `max_queue = 256`.

A setting is one field of `Settings`: its type, its `Flag` and its default. Everything else is made from that field: the
flag of `dsa serve`, the name in the environment and in the file, and the value under the same name in `ServerConfig`
(for the HTTP side) or `EngineConfig` (for the engine). These two have the defaults. The file has more than 400 lines because
it is one list, with a few lines for each setting.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from engine.config import (
    DEFAULT_DRAFT_TOKENS,
    CacheDtype,
    Drafter,
    EngineConfig,
    IndexerDtype,
    KernelChoice,
    LoadFormat,
    PlainDtype,
    SparseForm,
    WeightDtype,
)
from server.config import (
    LogFormat,
    Port,
    Positive,
    ReasoningField,
    SamplingSource,
    Seconds,
    ServerConfig,
    SomeSeconds,
    Sparsity,
    UnknownFields,
)
from server.hub.models import DEFAULT_MODEL, ModelFiles, cache_folder
from server.hub.sizes import parse_size, size_text
from server.telemetry.tracing import TracingError, check_endpoint

DEFAULT_MAX_TOKENS = {"deepseek_v3": 8192, "deepseek_v32": 8192, "glm_moe_dsa": 8192}
"""A request's token limit if it names none, by `model_type`; for others it is `ServerConfig`'s default."""


class SettingsError(ValueError):
    """A setting is not valid. The message is one sentence that says which setting, and what its value may be."""


class Flag(msgspec.Struct, frozen=True):
    """What `dsa serve --help` says about a setting.

    Attributes:
        panel: the heading above the flag.
        help: what the setting does.
        shown: the default in words; None: the default itself.
        metavar: the word for the value; None: the value's type.
        bytes_of: for a size, the field of `ServerConfig` or `EngineConfig` that gets it in bytes.
    """

    panel: str
    help: str
    shown: str | None = None
    metavar: str | None = None
    bytes_of: str | None = None


SERVER, ACCESS, MODEL, MEMORY = "Server", "Access", "Model", "Memory and scheduling"
COST, LOGS, ADVANCED = "Cost", "Logs and traces", "Advanced"
_HTTP, _ENGINE = ServerConfig(model_name=""), EngineConfig(weights="")
"""The settings of both sides with their defaults."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of `dsa serve`, under its name for users. None: other code chooses the value."""

    model: Annotated[
        str,
        Flag(
            "",
            "A name that dsa can fetch, a .gguf file, a folder with config.json and *.safetensors, or a name of the "
            "Hugging Face hub: org/name, org/name@revision, org/name:Q4_K_M.",
        ),
    ] = DEFAULT_MODEL

    host: Annotated[str, Flag(SERVER, "Address to listen on; 0.0.0.0 is every network.")] = _HTTP.host
    port: Annotated[Port, Flag(SERVER, "Port to listen on; 0 is any free one.")] = _HTTP.port
    uds: Annotated[
        str | None,
        Flag(SERVER, "Listen on this Unix socket, in place of host and port.", "none", "PATH"),
    ] = _HTTP.uds
    max_connections: Annotated[
        Positive,
        Flag(SERVER, "Clients connected at once; beyond, only probes are answered, and others get 503."),
    ] = _HTTP.max_connections
    served_model_name: Annotated[
        str | None,
        Flag(
            SERVER,
            "What clients call the model; after commas, other names that they may call it by.",
            "MODEL's name",
            "NAMES",
        ),
    ] = None
    max_queue: Annotated[Positive, Flag(SERVER, "Requests in work or waiting before new ones get 429.")] = (
        _HTTP.max_queue
    )
    min_priority: Annotated[
        Annotated[int, msgspec.Meta(ge=-(2**31), le=0)],
        Flag(
            SERVER,
            "The lowest `priority` that a request may have; lower is served earlier. 0: requests may only step back.",
        ),
    ] = _HTTP.min_priority
    canary_interval: Annotated[
        Seconds,
        Flag(
            SERVER,
            "Seconds between two runs of the canary, a fixed prompt that an idle server answers cold and on its cached prefix; "
            "answers that change are counted and told in /health/ready.",
            "off",
            "SECONDS",
        ),
    ] = _HTTP.canary_interval
    enable_force_include_usage: Annotated[
        bool, Flag(SERVER, "Every stream ends with its usage, whether its request asks for it or not.", "off")
    ] = _HTTP.enable_force_include_usage
    return_tokens_as_token_ids: Annotated[
        bool, Flag(SERVER, "Log-probabilities always name tokens by their ids, as token_id:123.", "off")
    ] = _HTTP.return_tokens_as_token_ids
    reasoning_field: Annotated[
        ReasoningField,
        Flag(
            SERVER,
            "Where a chat's answers have the reasoning: reasoning_content, as DeepSeek's interface has it, or reasoning, as "
            "vLLM and OpenRouter have it.",
            None,
            "NAME",
        ),
    ] = _HTTP.reasoning_field
    thinking_budget: Annotated[
        Positive | None,
        Flag(SERVER, "Most tokens of reasoning for requests that set no budget.", "any number"),
    ] = _HTTP.thinking_budget
    max_queue_tokens: Annotated[
        Positive | None,
        Flag(
            SERVER,
            "Tokens of prompts that wait to be computed before new requests get 429: a bound of the time to a first token.",
            "any number",
        ),
    ] = _HTTP.max_queue_tokens
    max_queue_seconds: Annotated[
        SomeSeconds | None,
        Flag(
            SERVER,
            "New requests get 429 when their first token would come later than this, by how long others waited lately.",
            "any time",
            "SECONDS",
        ),
    ] = _HTTP.max_queue_seconds
    request_seconds: Annotated[
        Seconds,
        Flag(
            SERVER,
            "Longest time of a request, which then ends with an error; a request may ask for less. 0: no limit.",
        ),
    ] = _HTTP.request_seconds
    unknown_fields: Annotated[
        UnknownFields,
        Flag(
            SERVER,
            "Fields that an endpoint does not know: accept (the answer's warnings name them) or refuse (400).",
            None,
            "accept|refuse",
        ),
    ] = _HTTP.unknown_fields
    keys: Annotated[
        str | None,
        Flag(
            ACCESS,
            "Callers' keys; dsa keys makes the file, and it is read again when it changes. Every route but the probes then "
            "asks for one.",
            "everybody is let in",
            "FILE",
        ),
    ] = _HTTP.keys
    public_metrics: Annotated[
        bool,
        Flag(ACCESS, "Let everybody read /metrics, who else needs a key of role metrics or admin.", "off"),
    ] = _HTTP.public_metrics
    allowed_hosts: Annotated[
        str,
        Flag(
            ACCESS,
            "Names that clients may call the server by: a list with commas, as api.example.com,*.local; * is any; auto is any, "
            "but on a loopback address without keys only addresses, localhost and this machine's name.",
            None,
            "NAMES",
        ),
    ] = _HTTP.allowed_hosts
    ssl_certfile: Annotated[
        str | None, Flag(ACCESS, "Serve HTTPS with this certificate chain (PEM).", "no TLS", "FILE")
    ] = _HTTP.ssl_certfile
    ssl_keyfile: Annotated[
        str | None, Flag(ACCESS, "The certificate's private key (PEM).", "in the certificate's file", "FILE")
    ] = _HTTP.ssl_keyfile
    allow_origins: Annotated[
        str,
        Flag(
            ACCESS,
            "Pages of which origins may use the server from a browser: none, *, or a list with commas.",
            None,
            "ORIGINS",
        ),
    ] = _HTTP.allow_origins
    sampling_defaults: Annotated[
        SamplingSource,
        Flag(
            SERVER,
            "How requests sample that do not say it: as the model's files say, or as OpenAI's interface does.",
            None,
            "model|openai",
        ),
    ] = "model"
    stored_responses: Annotated[
        Annotated[int, msgspec.Meta(ge=0)],
        Flag(SERVER, "Responses of /v1/responses that are kept in memory, for previous_response_id."),
    ] = _HTTP.stored_responses
    hang_seconds: Annotated[
        Seconds,
        Flag(
            SERVER,
            "An engine that makes no progress for so long is killed and replaced; 0 is never. While it loads, and while a "
            "CPU is busy with one step, it may take ten times as long.",
        ),
    ] = _HTTP.hang_seconds
    client_seconds: Annotated[
        SomeSeconds,
        Flag(
            SERVER,
            "A client is cut off that takes so long for its headers, or that neither sends nor reads for so long in the "
            "middle of a body or an answer.",
        ),
    ] = _HTTP.client_seconds
    drain_seconds: Annotated[
        Seconds, Flag(SERVER, "How long running requests may go on after Ctrl-C or SIGTERM.")
    ] = _HTTP.drain_seconds

    device: Annotated[str, Flag(MODEL, "Where to compute: auto, cpu, cuda or cuda:N.")] = _ENGINE.device
    dtype: Annotated[PlainDtype, Flag(MODEL, "Number format: auto, float32 or bfloat16.")] = _ENGINE.dtype
    max_model_len: Annotated[
        Annotated[int, msgspec.Meta(ge=2)] | None,
        Flag(MODEL, "Longest prompt plus answer, in tokens.", "what the model was trained for"),
    ] = _ENGINE.max_model_len
    top_k: Annotated[
        Sparsity | None,
        Flag(
            MODEL,
            "Sparsity for requests that do not choose: how many earlier tokens each token attends to, or dense.",
            "what the model's indexer was trained for",
            "N|dense",
        ),
    ] = _HTTP.default_top_k
    load_format: Annotated[
        LoadFormat,
        Flag(
            MODEL,
            "Where weights come from: auto (the checkpoint's files), or dummy (random numbers, to measure speed; MODEL is "
            "then a folder with config.json, and tokenizer.json if there is one).",
        ),
    ] = _ENGINE.load_format
    overlay: Annotated[
        str | None,
        Flag(MODEL, "A lightning indexer (.safetensors) to lay over the model.", "the model's own", "FILE"),
    ] = None

    kv_cache_memory: Annotated[
        str | None,
        Flag(
            MEMORY,
            "Memory for the context of all running requests, as 512MiB or 4GiB.",
            "1GiB; on one GPU most of what is free",
            "SIZE",
            "kv_cache_bytes",
        ),
    ] = None
    weight_dtype: Annotated[
        WeightDtype,
        Flag(
            MEMORY,
            "Weights stored in FP8 (DeepSeek family) are kept so: auto (on CUDA), fp8, or plain (in --dtype).",
        ),
    ] = _ENGINE.weight_dtype
    kv_cache_dtype: Annotated[
        CacheDtype,
        Flag(
            MEMORY,
            "Numbers of cached latents (DeepSeek family): auto (fp8 where the weights are), bf16 or fp8.",
        ),
    ] = _ENGINE.kv_cache_dtype
    indexer_dtype: Annotated[
        IndexerDtype,
        Flag(
            MEMORY,
            "Numbers of index keys and queries: bf16, fp8 (DeepSeek family), int8 (Llama family), or auto (fp8 "
            "where the weights are, int8 with native kernels).",
        ),
    ] = _ENGINE.indexer_dtype
    kernels: Annotated[
        KernelChoice,
        Flag(
            MEMORY,
            "What computes attention: native (compiled, CPU), triton (CUDA), torch, reference (slow), or auto.",
        ),
    ] = _ENGINE.kernels
    token_budget: Annotated[
        Positive | None, Flag(MEMORY, "Most tokens computed in one step.", "512; on a GPU 2048")
    ] = _ENGINE.token_budget
    max_running: Annotated[
        Positive | None, Flag(MEMORY, "Most requests computed in one step.", "64; on a GPU 256")
    ] = _ENGINE.max_running
    threads: Annotated[Positive | None, Flag(MEMORY, "CPU threads.", "one per core")] = _ENGINE.threads
    tensor_parallel: Annotated[
        Positive, Flag(MEMORY, "Split the model over so many devices (DeepSeek family).")
    ] = _ENGINE.tensor_parallel
    nodes: Annotated[
        Positive,
        Flag(
            MEMORY, "Hosts that have those devices, as many each: this one, and others that run dsa worker."
        ),
    ] = _ENGINE.nodes
    leader: Annotated[
        str | None,
        Flag(
            MEMORY,
            "Where the other nodes join this one: an address of this host in a network that is theirs alone.",
            "none, with one node",
            "HOST:PORT",
        ),
    ] = _ENGINE.leader
    node_secret_file: Annotated[
        str | None,
        Flag(
            MEMORY,
            "A secret of 32 bytes or more that only the nodes have; dsa worker needs the same.",
            "none, which only a leader on the loopback may do without",
            "FILE",
        ),
    ] = _ENGINE.node_secret_file
    prefix_caching: Annotated[
        bool, Flag(MEMORY, "Reuse what requests that begin alike have in common.", "on")
    ] = _ENGINE.prefix_caching

    prices: Annotated[
        str | None,
        Flag(COST, "A price table; it is read again when it changes.", "the one that ships", "FILE"),
    ] = _HTTP.prices
    machine_price: Annotated[
        str | None, Flag(COST, "USD an hour of the device.", "the price table's", "USD")
    ] = _HTTP.machine_price
    ledger: Annotated[
        str | None,
        Flag(
            COST,
            "Where usage is written down: a SQLite file, a SQLAlchemy URL, or none.",
            "usage.sqlite beside the fetched models",
            "FILE|URL|none",
        ),
    ] = None
    cost_calibration: Annotated[
        str | None,
        Flag(COST, "Measured coefficients of the cost model.", "assumed from the model's shape", "FILE"),
    ] = _ENGINE.cost_calibration

    max_tokens: Annotated[
        Positive | None,
        Flag(
            ADVANCED,
            "Token limit for requests that name none.",
            f"{DEFAULT_MAX_TOKENS['deepseek_v3']} for the DeepSeek-V3 family, else {_HTTP.default_max_tokens}",
        ),
    ] = None
    chat_format: Annotated[
        str,
        Flag(
            MODEL,
            "How conversations become prompts: auto, jinja (the checkpoint's own template), deepseek-v3.1 or "
            "deepseek-v3.2.",
            None,
            "NAME",
        ),
    ] = "auto"
    tool_format: Annotated[
        str,
        Flag(
            MODEL,
            "How the model of a checkpoint's own template writes calls of tools: auto, hermes, llama-json, pythonic, "
            "mistral or none.",
            None,
            "NAME",
        ),
    ] = "auto"
    max_n: Annotated[Positive, Flag(ADVANCED, "Most choices in one request.")] = _HTTP.max_n
    max_prompts: Annotated[Positive, Flag(ADVANCED, "Most prompts in one request.")] = _HTTP.max_prompts
    max_logprobs: Annotated[
        Annotated[int, msgspec.Meta(ge=-1)],
        Flag(
            ADVANCED,
            "Most alternatives of a log-probability in one request; -1: the whole vocabulary, some megabytes a token.",
        ),
    ] = _HTTP.max_logprobs
    max_body: Annotated[str, Flag(ADVANCED, "Largest request body.", None, "SIZE", "max_body_bytes")] = (
        size_text(_HTTP.max_body_bytes)
    )
    score_memory: Annotated[
        str, Flag(ADVANCED, "Memory for one tile of attention scores.", None, "SIZE", "score_budget_bytes")
    ] = size_text(_ENGINE.score_budget_bytes)
    batch_invariant: Annotated[
        bool,
        Flag(
            ADVANCED,
            "Give each prompt the same tokens in any company, to the bit. On a CPU only dense rows of prompts cost more: "
            "of 512 tokens 9 %, after 1,536 others 36 %. On a GPU prompts take about three times as long.",
            "off",
        ),
    ] = _ENGINE.batch_invariant
    sparse_form: Annotated[
        SparseForm, Flag(ADVANCED, "How long contexts are attended: auto, gather or mask.")
    ] = _ENGINE.sparse_form

    log_format: Annotated[
        LogFormat, Flag(LOGS, "text, or json: an object a line, and one line a request.", None, "text|json")
    ] = _HTTP.log_format
    log_prompts: Annotated[bool, Flag(LOGS, "Put prompts into the log, too.", "never")] = _HTTP.log_prompts
    otlp_endpoint: Annotated[
        str | None,
        Flag(
            LOGS,
            "Send a trace a request to this OpenTelemetry receiver (OTLP over HTTP), as http://localhost:4318.",
            "no traces",
            "URL",
        ),
    ] = _HTTP.otlp_endpoint

    profile_dir: Annotated[
        str | None,
        Flag(
            LOGS,
            "Write torch.profiler traces of the engine's steps into this folder: one after --profile-after steps, and "
            "one whenever a file called start appears there (touch DIR/start).",
            "no profiling",
            "DIR",
        ),
    ] = _ENGINE.profile_dir
    profile_after: Annotated[
        Annotated[int, msgspec.Meta(ge=0)], Flag(LOGS, "Steps before the first trace.")
    ] = _ENGINE.profile_after
    profile_steps: Annotated[Positive, Flag(LOGS, "Steps of each trace.")] = _ENGINE.profile_steps

    drafter: Annotated[
        Drafter,
        Flag(
            ADVANCED,
            "What guesses tokens ahead, to be verified in one step (speculative decoding): off, ngram "
            "(repetitions in the text) or mtp (the draft layer of a DeepSeek checkpoint). Answers stay the same.",
        ),
    ] = _ENGINE.drafter
    speculative_tokens: Annotated[
        Positive | None,
        Flag(
            ADVANCED, "Most tokens guessed ahead for each request.",
            f"{DEFAULT_DRAFT_TOKENS['ngram']}, mtp {DEFAULT_DRAFT_TOKENS['mtp']}",
        ),
    ] = _ENGINE.speculative_tokens  # fmt: skip

    def overlay_path(self) -> Path | None:
        """The path of the overlay, if one is set."""
        return None if self.overlay is None else Path(self.overlay).expanduser()

    def server(self, model_name: str, model_type: str = "") -> ServerConfig:
        """Make the config of the HTTP side.

        Args:
            model_name: the model's name if no setting has one.
            model_type: the model's type; it decides the default token limit of a request.

        Raises:
            SettingsError: a size is not valid, prompts would be logged without a log, or traces cannot be exported.
        """
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise SettingsError("--ssl-keyfile needs --ssl-certfile, the certificate that the key belongs to")
        if self.log_prompts and self.log_format != "json":
            raise SettingsError("--log-prompts needs --log-format json, whose access lines have the prompts")
        names = [model_name] if self.served_model_name is None else _names(self.served_model_name)
        try:
            if self.otlp_endpoint is not None:
                check_endpoint(self.otlp_endpoint)
            given = self._given_to(ServerConfig) | {
                "model_name": names[0],
                "model_aliases": tuple(names[1:]),
                "default_max_tokens": self.max_tokens
                or DEFAULT_MAX_TOKENS.get(model_type, _HTTP.default_max_tokens),
                "default_top_k": self.top_k,
                "machine_price": _decimal(self.machine_price),
                "ledger": None if self.ledger == "none" else self.ledger or default_ledger(),
            }
        except (TracingError, ValueError) as error:
            raise SettingsError(str(error)) from error
        return ServerConfig(**given)

    def engine(self, files: ModelFiles) -> EngineConfig:
        """Make the config of the engine.

        Raises:
            SettingsError: the settings contradict each other, or a size is not valid.
        """
        overlay = None if files.overlay is None else str(files.overlay)
        try:
            return EngineConfig(
                **self._given_to(EngineConfig) | {"weights": str(files.weights), "overlay": overlay}
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error

    def _given_to(self, part: type[ServerConfig | EngineConfig]) -> dict[str, Any]:
        """The settings that `part` has as well, under the same name or as the bytes of a size."""
        given: dict[str, Any] = {}
        for name, flag in FLAGS.items():
            value = getattr(self, name)
            if flag.bytes_of is not None:
                name, value = flag.bytes_of, None if value is None else parse_size(value, name)
            if name in part.__struct_fields__:
                given[name] = value
        return given


KINDS: dict[str, Any] = get_type_hints(Settings, include_extras=True)
"""The type of each setting, with its bounds."""
FLAGS: dict[str, Flag] = {name: kind.__metadata__[-1] for name, kind in KINDS.items()}


def default_ledger() -> str:
    """The default place of the usage ledger: beside the fetched models."""
    return str(cache_folder() / "usage.sqlite")


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise SettingsError(
            f"served_model_name is {text!r}; expected a name, or names with commas between them"
        )
    return names


def _decimal(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,9})?", text):
        raise SettingsError(f"machine_price is {text!r}; expected USD an hour, such as 0.10")
    return text


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
    """Merge flags, environment and file, and check every value.

    Args:
        flags: name -> value; None: the flag was not given.
        environ: the environment; only `DSA_<NAME>` of known settings is read.
        file: a TOML file; None: $DSA_CONFIG.

    Raises:
        SettingsError: a value is not valid, or the file is missing or has an unknown setting.
    """
    if file is None and environ.get("DSA_CONFIG"):
        file = Path(environ["DSA_CONFIG"])
    values: dict[str, Any] = {}
    for origin, name, value in (*_from_file(file), *_from_environ(environ), *_from_flags(flags)):
        try:
            values[name] = msgspec.convert(value, KINDS[name], strict=False)
        except msgspec.ValidationError as error:
            expected = str(error).removeprefix("Expected ").replace("`", "")
            raise SettingsError(f"{origin} is {value!r}; expected {_choices(name) or expected}") from None
    settings = Settings(**values)
    settings.server("any")  # so that an invalid size is found before anything is loaded
    settings.engine(ModelFiles("any", Path("any"), None, None))
    return settings


def _from_file(file: Path | None) -> Iterator[tuple[str, str, Any]]:
    if file is None:
        return
    try:
        entries = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from error
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in KINDS:
            raise SettingsError(
                f"the settings file {file} has {key!r}, which is no setting; there are {', '.join(KINDS)}"
            )
        yield f"{key} in {file}", name, str(value) if KINDS[name].__origin__ is str else value


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[str, str, Any]]:
    for name in KINDS:
        variable = f"DSA_{name.upper()}"
        if environ.get(variable):  # an empty value counts as not set, as in compose files
            yield variable, name, environ[variable]


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in flags.items():
        if value is not None:
            yield "MODEL" if name == "model" else f"--{name.replace('_', '-')}", name, value


def _choices(name: str) -> str | None:
    """Say what a value may be, for the types that msgspec describes badly."""
    kind = KINDS[name].__origin__
    if kind == Sparsity | None:
        return "a number of tokens, or dense"
    return "one of " + ", ".join(get_args(kind)) if get_origin(kind) is Literal else None
