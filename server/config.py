"""Settings: read once from flags, environment and file, checked, frozen.

A flag wins over `DSA_<NAME>` in the environment, which wins over the file, which wins over the
default. One name serves all three: `--max-queue`, `DSA_MAX_QUEUE`, `max_queue = 256`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from engine.config import CacheDtype, EngineConfig, IndexerDtype, KernelChoice, WeightDtype
from server.hub.models import DEFAULT_MODEL, ModelFiles, cache_folder
from server.telemetry.tracing import TracingError, check_endpoint

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Sparsity = Positive | Literal["dense"]

DEFAULT_MAX_TOKENS = {"deepseek_v3": 8192, "deepseek_v32": 8192, "glm_moe_dsa": 8192}
"""A request's token limit if it names none, by `model_type`; 1024 for others."""

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)


class SettingsError(ValueError):
    """A setting is not valid; the message is one sentence that says which one and what it may be."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side needs to know.

    Attributes:
        model_name: what clients call the model.
        host: the address to listen on.
        port: the port to listen on; 0 is any free one.
        max_queue: requests that may be in work or waiting before new ones are refused.
        default_max_tokens: a request's token limit if it names none; None is the context's end.
        default_top_k: a request's sparsity if it names none; None is what the indexer was trained for.
        max_body_bytes: the largest request body.
        drain_seconds: how long running requests may go on after the signal to stop.
        max_n: choices in one request.
        max_prompts: prompts in one request.
        log_format: lines for a person, or JSON with an access line a request.
        log_prompts: whether access lines have the prompts.
        otlp_endpoint: where traces go; None is nowhere.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: Port = 8000
    max_queue: Positive = 256
    default_max_tokens: Positive | None = 1024  # a small model at temperature 1 may never stop by itself
    default_top_k: Sparsity | None = None
    max_body_bytes: Positive = 8 << 20
    drain_seconds: Seconds = 30.0
    max_n: Positive = 8
    max_prompts: Positive = 64
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    prices: str | None = None  # a YAML file; None is the table that ships
    machine_price: str | None = None  # USD an hour of the device; None is the table's
    ledger: str | None = None  # a SQLAlchemy URL or a SQLite file; None keeps no ledger


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Every setting of `dsa serve`, under the name that users give it; None leaves it to others."""

    model: str = DEFAULT_MODEL
    overlay: str | None = None
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: Port = 8000
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: Positive | None = None
    tensor_parallel: Positive = 1
    nodes: Positive = 1
    leader: str | None = None
    max_model_len: Annotated[int, msgspec.Meta(ge=2)] | None = None
    kv_cache_memory: str = "1GiB"
    token_budget: Positive = 512
    max_running: Positive = 64
    prefix_caching: bool = True
    score_memory: str = "64MiB"
    sparse_form: Literal["auto", "gather", "mask"] = "auto"
    drafter: Literal["off", "ngram", "mtp"] = "off"
    speculative_tokens: Positive | None = None
    weight_dtype: WeightDtype = "auto"
    kv_cache_dtype: CacheDtype = "auto"
    indexer_dtype: IndexerDtype = "auto"
    kernels: KernelChoice = "auto"
    top_k: Sparsity | None = None
    max_tokens: Positive | None = None
    chat_format: str = "auto"
    max_queue: Positive = 256
    max_n: Positive = 8
    max_prompts: Positive = 64
    max_body: str = "8MiB"
    drain_seconds: Seconds = 30.0
    log_format: Literal["text", "json"] = "text"
    log_prompts: bool = False
    otlp_endpoint: str | None = None
    prices: str | None = None
    machine_price: str | None = None
    ledger: str | None = None
    cost_calibration: str | None = None

    def overlay_path(self) -> Path | None:
        """The overlay that was asked for."""
        return None if self.overlay is None else Path(self.overlay).expanduser()

    def server(self, model_name: str, model_type: str = "") -> ServerConfig:
        """The HTTP side's part.

        Args:
            model_name: what the model is called where no setting says so.
            model_type: its family, by which the token limit of requests that name none is chosen.

        Raises:
            SettingsError: a size is not valid, prompts have no log to go to, or traces cannot be exported.
        """
        if self.log_prompts and self.log_format != "json":
            raise SettingsError("--log-prompts needs --log-format json, whose access lines have the prompts")
        if self.otlp_endpoint is not None:
            try:
                check_endpoint(self.otlp_endpoint)
            except TracingError as error:
                raise SettingsError(str(error)) from error
        return ServerConfig(
            model_name=self.served_model_name or model_name,
            host=self.host,
            port=self.port,
            max_queue=self.max_queue,
            default_max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS.get(model_type, 1024),
            default_top_k=self.top_k,
            max_body_bytes=parse_size(self.max_body, "max_body"),
            drain_seconds=self.drain_seconds,
            max_n=self.max_n,
            max_prompts=self.max_prompts,
            log_format=self.log_format,
            log_prompts=self.log_prompts,
            otlp_endpoint=self.otlp_endpoint,
            prices=self.prices,
            machine_price=_decimal(self.machine_price),
            ledger=None if self.ledger == "none" else self.ledger or default_ledger(),
        )

    def engine(self, files: ModelFiles) -> EngineConfig:
        """The engine's part.

        Raises:
            SettingsError: the settings contradict each other, or a size is not valid.
        """
        try:
            return EngineConfig(
                weights=str(files.weights),
                overlay=None if files.overlay is None else str(files.overlay),
                device=self.device,
                dtype=self.dtype,
                max_model_len=self.max_model_len,
                kv_cache_bytes=parse_size(self.kv_cache_memory, "kv_cache_memory"),
                token_budget=self.token_budget,
                max_running=self.max_running,
                prefix_caching=self.prefix_caching,
                score_budget_bytes=parse_size(self.score_memory, "score_memory"),
                threads=self.threads,
                tensor_parallel=self.tensor_parallel,
                nodes=self.nodes,
                leader=self.leader,
                sparse_form=self.sparse_form,
                drafter=self.drafter,
                speculative_tokens=self.speculative_tokens,
                weight_dtype=self.weight_dtype,
                kv_cache_dtype=self.kv_cache_dtype,
                indexer_dtype=self.indexer_dtype,
                kernels=self.kernels,
                cost_calibration=self.cost_calibration,
            )
        except SettingsError:
            raise
        except ValueError as error:
            raise SettingsError(str(error)) from error


def default_ledger() -> str:
    """Where the usage ledger is if nobody says otherwise: beside the fetched models."""
    return str(cache_folder() / "usage.sqlite")


def _decimal(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"\d{1,6}(\.\d{1,9})?", text):
        raise SettingsError(f"machine_price is {text!r}; expected USD an hour, such as 0.10")
    return text


def load_settings(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None = None) -> Settings:
    """Merge the three sources and check every value.

    Args:
        flags: by name; None stands for a flag that was not given.
        environ: of which only `DSA_<NAME>` of known names is read.
        file: a TOML file; $DSA_CONFIG if None.

    Raises:
        SettingsError: a value is not valid, or the file is missing or has a name that no setting has.
    """
    if file is None and environ.get("DSA_CONFIG"):
        file = Path(environ["DSA_CONFIG"])
    kinds = get_type_hints(Settings, include_extras=True)
    values: dict[str, Any] = {}
    for origin, name, value in (
        *_from_file(file, kinds),
        *_from_environ(environ, kinds),
        *_from_flags(flags),
    ):
        try:
            values[name] = msgspec.convert(value, kinds[name], strict=False)
        except msgspec.ValidationError as error:
            expected = str(error).removeprefix("Expected ").replace("`", "")
            raise SettingsError(
                f"{origin} is {value!r}; expected {_choices(kinds[name]) or expected}"
            ) from None
    settings = Settings(**values)
    settings.server("any")  # so that sizes are found wrong before anything is loaded
    settings.engine(ModelFiles("any", Path("any"), None, None))
    return settings


def parse_size(text: str, name: str) -> int:
    """Return the bytes of "1GiB", "512 MB" or "1048576".

    Raises:
        SettingsError: it is none of those, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size < 1:
        raise SettingsError(f"{name} is {text!r}; expected a size such as 512MiB, 1GiB or a number of bytes")
    return size


def _from_file(file: Path | None, kinds: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    if file is None:
        return
    try:
        entries = tomllib.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(f"the settings file {file} cannot be read: {error}") from error
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise SettingsError(
                f"the settings file {file} has {key!r}, which is no setting; there are {', '.join(kinds)}"
            )
        yield f"{key} in {file}", name, str(value) if kinds[name] is str else value


def _from_environ(environ: Mapping[str, str], kinds: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name in kinds:
        variable = f"DSA_{name.upper()}"
        if environ.get(variable):  # an empty one is as good as none, as in compose files
            yield variable, name, environ[variable]


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for name, value in flags.items():
        if value is not None:
            yield "MODEL" if name == "model" else f"--{name.replace('_', '-')}", name, value


def _choices(kind: Any) -> str | None:
    """What a value may be, for the kinds that msgspec describes badly."""
    if kind == Sparsity | None:
        return "a number of tokens, or dense"
    if getattr(kind, "__origin__", None) is Literal:
        return "one of " + ", ".join(kind.__args__)
    return None
