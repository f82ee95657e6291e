"""The `dsa` command. The only reader of arguments and environment.

Each command imports what it needs when it runs, so that `dsa --help` is quick, and none imports
torch: what computes is started as a process of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from server.cli.bench import bench
from server.cli.calibrate import calibrate
from server.cli.distill import distill
from server.cli.eval import evaluate
from server.cli.inspect import inspect
from server.cli.usage import usage
from server.cli.worker import worker
from server.config import Settings, SettingsError, load_settings

app = typer.Typer(
    name="dsa",
    help="Serve language models with DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_DEFAULTS = Settings()
_SERVER, _MODEL, _MEMORY, _COST, _LOGS, _ADVANCED = (
    *("Server", "Model", "Memory and scheduling", "Cost", "Logs and traces", "Advanced"),
)


def main() -> NoReturn:
    """Run the command line and leave the process."""
    signal.signal(signal.SIGTERM, _interrupt)  # as PID 1 of a container, a process has no default for it
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def fail(message: object, code: int = 1) -> NoReturn:
    """Print one sentence and leave."""
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _option(panel: str, text: str, default: str, metavar: str | None = None, *names: str) -> Any:
    """A flag of `dsa serve`. It is None unless given, so that environment and file can be heard."""
    return typer.Option(
        *names, help=f"{text} [dim]\\[default: {default}][/dim]", rich_help_panel=panel, metavar=metavar
    )


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A name that dsa can fetch, a .gguf file, or a folder with config.json and *.safetensors. "
            f"[dim]\\[default: {_DEFAULTS.model}][/dim]",
            show_default=False,
        ),
    ] = None,
    host: Annotated[
        str | None, _option(_SERVER, "Address to listen on; 0.0.0.0 is every network.", _DEFAULTS.host)
    ] = None,
    port: Annotated[
        int | None, _option(_SERVER, "Port to listen on; 0 is any free one.", str(_DEFAULTS.port))
    ] = None,
    served_model_name: Annotated[
        str | None, _option(_SERVER, "What clients call the model.", "MODEL's name", "NAME")
    ] = None,
    max_queue: Annotated[
        int | None,
        _option(_SERVER, "Requests in work or waiting before new ones get 429.", str(_DEFAULTS.max_queue)),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        _option(
            _SERVER,
            "How long running requests may go on after Ctrl-C or SIGTERM.",
            f"{_DEFAULTS.drain_seconds:g}",
        ),
    ] = None,
    device: Annotated[
        str | None, _option(_MODEL, "Where to compute: auto, cpu, cuda or cuda:N.", _DEFAULTS.device)
    ] = None,
    dtype: Annotated[
        str | None, _option(_MODEL, "Number format: auto, float32 or bfloat16.", _DEFAULTS.dtype)
    ] = None,
    max_model_len: Annotated[
        int | None,
        _option(_MODEL, "Longest prompt plus answer, in tokens.", "what the model was trained for"),
    ] = None,
    top_k: Annotated[
        str | None,
        _option(
            _MODEL,
            "Sparsity for requests that do not choose: how many earlier tokens each token attends to, or dense.",
            "what the model's indexer was trained for",
            "N|dense",
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        _option(
            _MODEL, "A lightning indexer (.safetensors) to lay over the model.", "the model's own", "FILE"
        ),
    ] = None,
    kv_cache_memory: Annotated[
        str | None,
        _option(
            _MEMORY,
            "Memory for the context of all running requests, as 512MiB or 4GiB.",
            _DEFAULTS.kv_cache_memory,
            "SIZE",
        ),
    ] = None,
    weight_dtype: Annotated[
        str | None,
        _option(
            _MEMORY,
            "Weights stored in FP8 (DeepSeek family) are kept so: auto (on CUDA), fp8, or plain (in --dtype).",
            _DEFAULTS.weight_dtype,
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        str | None,
        _option(
            _MEMORY,
            "Numbers of cached latents (DeepSeek family): auto (fp8 where the weights are), bf16 or fp8.",
            _DEFAULTS.kv_cache_dtype,
        ),
    ] = None,
    indexer_dtype: Annotated[
        str | None,
        _option(
            _MEMORY,
            "Numbers of index keys and queries: bf16, fp8 (DeepSeek family), int8 (Llama family), or auto (fp8 "
            "where the weights are, int8 with native kernels).",
            _DEFAULTS.indexer_dtype,
        ),
    ] = None,
    kernels: Annotated[
        str | None,
        _option(
            _MEMORY,
            "What computes attention: native (compiled, CPU), torch, reference (slow), or auto.",
            _DEFAULTS.kernels,
        ),
    ] = None,
    token_budget: Annotated[
        int | None, _option(_MEMORY, "Most tokens computed in one step.", str(_DEFAULTS.token_budget))
    ] = None,
    max_running: Annotated[
        int | None, _option(_MEMORY, "Most requests computed in one step.", str(_DEFAULTS.max_running))
    ] = None,
    threads: Annotated[int | None, _option(_MEMORY, "CPU threads.", "one per core")] = None,
    tensor_parallel: Annotated[
        int | None,
        _option(
            _MEMORY,
            "Split the model over so many devices (DeepSeek family).",
            str(_DEFAULTS.tensor_parallel),
        ),
    ] = None,
    nodes: Annotated[
        int | None,
        _option(
            _MEMORY,
            "Hosts that have those devices, as many each: this one, and others that run dsa worker.",
            str(_DEFAULTS.nodes),
        ),
    ] = None,
    leader: Annotated[
        str | None,
        _option(
            _MEMORY,
            "Where the other nodes join this one: an address of this host in a network that is theirs alone.",
            "none, with one node",
            "HOST:PORT",
        ),
    ] = None,
    prefix_caching: Annotated[
        bool | None,
        _option(
            _MEMORY,
            "Reuse what requests that begin alike have in common.",
            "on",
            None,
            "--prefix-caching/--no-prefix-caching",
        ),
    ] = None,
    prices: Annotated[
        str | None,
        _option(_COST, "A price table; it is read again when it changes.", "the one that ships", "FILE"),
    ] = None,
    machine_price: Annotated[
        str | None, _option(_COST, "USD an hour of the device.", "the price table's", "USD")
    ] = None,
    ledger: Annotated[
        str | None,
        _option(
            _COST,
            "Where usage is written down: a SQLite file, a SQLAlchemy URL, or none.",
            "usage.sqlite beside the fetched models",
            "FILE|URL|none",
        ),
    ] = None,
    cost_calibration: Annotated[
        str | None,
        _option(_COST, "Measured coefficients of the cost model.", "assumed from the model's shape", "FILE"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        _option(
            _ADVANCED,
            "Token limit for requests that name none.",
            "8192 for the DeepSeek-V3 family, else 1024",
        ),
    ] = None,
    chat_format: Annotated[
        str | None,
        _option(
            _MODEL,
            "How conversations become prompts: auto, jinja (the checkpoint's own template), deepseek-v3.1 or "
            "deepseek-v3.2.",
            _DEFAULTS.chat_format,
            "NAME",
        ),
    ] = None,
    max_n: Annotated[
        int | None, _option(_ADVANCED, "Most choices in one request.", str(_DEFAULTS.max_n))
    ] = None,
    max_prompts: Annotated[
        int | None, _option(_ADVANCED, "Most prompts in one request.", str(_DEFAULTS.max_prompts))
    ] = None,
    max_body: Annotated[
        str | None, _option(_ADVANCED, "Largest request body.", _DEFAULTS.max_body, "SIZE")
    ] = None,
    score_memory: Annotated[
        str | None,
        _option(_ADVANCED, "Memory for one tile of attention scores.", _DEFAULTS.score_memory, "SIZE"),
    ] = None,
    sparse_form: Annotated[
        str | None,
        _option(_ADVANCED, "How long contexts are attended: auto, gather or mask.", _DEFAULTS.sparse_form),
    ] = None,
    log_format: Annotated[
        str | None,
        _option(
            _LOGS,
            "text, or json: an object a line, and one line a request.",
            _DEFAULTS.log_format,
            "text|json",
        ),
    ] = None,
    log_prompts: Annotated[
        bool | None,
        _option(_LOGS, "Put prompts into the log, too.", "never", None, "--log-prompts/--no-log-prompts"),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        _option(
            _LOGS,
            "Send a trace a request to this OpenTelemetry receiver (OTLP over HTTP), as http://localhost:4318.",
            "no traces",
            "URL",
        ),
    ] = None,
    drafter: Annotated[
        str | None,
        _option(
            _ADVANCED,
            "What guesses tokens ahead, to be verified in one step (speculative decoding): off, ngram "
            "(repetitions in the text) or mtp (the draft layer of a DeepSeek checkpoint). Answers stay the same.",
            _DEFAULTS.drafter,
        ),
    ] = None,
    speculative_tokens: Annotated[
        int | None, _option(_ADVANCED, "Most tokens guessed ahead for each request.", "4, mtp 1")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file with any of these settings, under the names of the flags. Flags win over "
            "DSA_<NAME> in the environment, which wins over the file.",
            rich_help_panel=_ADVANCED,
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP, with OpenAI's interface.

    Without a MODEL it fetches a small one (93 MB, once) and serves that.
    """
    flags = {name: value for name, value in locals().items() if name != "config"}
    from server.hub.models import ModelError
    from server.serve import ServeError
    from server.serve import serve as run
    from server.text.tokenizer import TokenizerError

    try:
        settings = load_settings(flags | {"overlay": overlay and str(overlay)}, os.environ, config)
    except SettingsError as error:
        fail(error, 2)
    try:
        code = run(settings)
    except (ServeError, ModelError, TokenizerError, ValueError) as error:
        code = 2 if isinstance(error, SettingsError) else 1
        if settings.log_format == "text":
            fail(error, code)
        logging.getLogger("server.serve").critical("%s", error)
    raise typer.Exit(code)


@app.command()
def pull(
    model: Annotated[str, typer.Argument(help="The model to fetch.")] = _DEFAULTS.model,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash the files again, even if they were before.")
    ] = False,
) -> None:
    """Fetch a model into the cache, so that `dsa serve` starts without a network."""
    from server.hub.models import ModelError, resolve
    from server.hub.stages import Stages

    try:
        with Stages() as stages:
            files = resolve(model, report=stages, rehash=verify)
    except ModelError as error:
        fail(error)
    print(f"{files.name}: {files.weights}" + (f" (license: {files.license})" if files.license else ""))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, typer.Option(help="Which of its models to talk to.", show_default="the first")
    ] = None,
    top_k: Annotated[
        str | None,
        typer.Option(
            metavar="N|dense",
            help="How many earlier tokens each token attends to.",
            show_default="the server's",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 always takes the likeliest token.", min=0, max=2)
    ] = 0.7,
) -> None:
    """Talk to a running server. /clear forgets the conversation, /quit leaves."""
    from server.cli.chat import ChatClientError, talk

    if top_k is not None and top_k != "dense" and not (top_k.isdigit() and int(top_k)):
        fail(f"--top-k is {top_k!r}; expected a number of tokens, or dense", 2)
    sparsity = int(top_k) if top_k is not None and top_k.isdigit() else top_k
    try:
        talk(url, model=model, top_k=sparsity, temperature=temperature)
    except ChatClientError as error:
        fail(error)


app.command()(distill)
app.command()(inspect)
app.command("eval")(evaluate)
app.command()(usage)
app.command()(calibrate)
app.add_typer(bench, name="bench")
app.command()(worker)
