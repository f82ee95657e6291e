"""The life of the server process: bind the port, load, listen, drain, exit.

uvicorn's own signal handling is not used: it stops accepting at once and re-raises the signal at the end.
Here the server answers new requests with a clear 503 after a signal, while it finishes the running ones.
Then the process exits with 0. The application itself is `server.app`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import resource
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvicorn

from engine.client import Engine, EngineState
from server.access.keys import read_keys
from server.app import create_app
from server.chat import ChatFormat, choose, choose_tool_format, load_chat_format
from server.chat.detect import model_type
from server.config import LogFormat, ServerConfig
from server.generation.grammars import vocabulary_of
from server.http.connection import connections
from server.http.hosts import is_local
from server.hub.catalogue import CODER_MODEL, DEFAULT_MODEL
from server.hub.models import resolve
from server.hub.sampling import read_sampling
from server.hub.stages import Stages
from server.lifecycle import Lifecycle
from server.listen import ServeError, check_certificate, listening
from server.settings import Settings
from server.telemetry.logs import configure, engine_output
from server.text.loading import has_tokenizer, load_tokenizer, stand_in
from server.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_CLOSE_SECONDS = 2  # time for connections to close after their requests have ended


def serve(settings: Settings) -> int:
    """Run a server until a signal ends it; return the process's exit code.

    Raises:
        ServeError: the port is taken, or the engine failed.
        ModelError, TokenizerError, PromptError, SettingsError, KeysError: the model, a setting or the keys are not valid.
    """
    sink = configure(settings.log_format)
    raise_descriptor_limit()
    if settings.keys is not None:  # a fault in the file is found before anything is loaded
        read_keys(Path(settings.keys).expanduser())
    check_certificate(settings.ssl_certfile, settings.ssl_keyfile)
    with listening(settings) as listener:  # before loading, to report a taken port at once
        if settings.keys is None and settings.uds is None and not is_local(settings.host):
            _log.warning(OPEN_TO_ALL, settings.host)
        with _stages(settings.log_format) as stages:
            random = settings.load_format == "dummy"
            files = resolve(
                settings.model, overlay=settings.overlay_path(), report=stages, config_only=random
            )
            if settings.model == DEFAULT_MODEL:
                stages(_A_LARGER_ONE, 0, 0)
            stages("reading the tokenizer", 0, 0)
            if random and not has_tokenizer(files.weights):
                stages(
                    "no tokenizer.json: every byte is a token, and other token ids stand for made-up words",
                    0,
                    0,
                )
                text = stand_in(files.weights)
                name, why = "jinja", "the stand-in tokenizer has no tokens for chat"
            else:
                text = load_tokenizer(files.weights)
                name, why = choose(files.weights, settings.chat_format)
            calls, reason = choose_tool_format(files.weights, name, settings.tool_format)
            chat = load_chat_format(files.weights, name, text, tool_format=settings.tool_format)
            stages(f"chat format: {name} ({why})", 0, 0)
            stages(f"calls of tools: {calls} ({reason})", 0, 0)
        config = settings.server(files.name, model_type(files.weights))
        if settings.sampling_defaults == "model":
            config = msgspec.structs.replace(config, sampling=read_sampling(files.weights, files.name))
        from engine.supervisor import SubprocessEngine  # only when the port and the model are good

        engine = SubprocessEngine(
            settings.engine(files),
            # Never the server's own output: who reads the log could stop the engine.
            on_output=engine_output
            if settings.log_format == "json"
            else lambda text: sink.write(f"{text}\n"),
            vocabulary=vocabulary_of(text),
            hang_seconds=config.hang_seconds,
        )
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(run(config, engine, text, chat, listener))
        finally:
            sink.flush(1.0)


_A_LARGER_ONE = f"{DEFAULT_MODEL} is small, for a first try; {CODER_MODEL} (1.1 GB) writes code, calls tools and has 32K of context"

OPEN_TO_ALL = (
    "WARNING: this server listens on %s and has no keys: whoever reaches it may use it, read the metrics, and spend the "
    "machine's time. Make a key with dsa keys new NAME --keys FILE and start with --keys FILE, or listen on 127.0.0.1"
)


_OWN_DESCRIPTORS = 128
"""Files that the server needs beside its connections: engine, ledger, logs, threads."""


def _room(most: int) -> int:
    """How many connections there is room for, of `most`: each needs a descriptor."""
    return max(min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_DESCRIPTORS), 16)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to the hard one: each connection needs a descriptor, and a new engine a few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def run(
    config: ServerConfig, engine: Engine, text: Tokenizer, chat: ChatFormat, listener: socket.socket
) -> int:
    """Serve on a bound socket until a signal comes; return the process's exit code.

    Raises:
        ServeError: the engine has failed and will not start again.
    """
    app = create_app(config, engine, text, chat)
    # What exists now lives to the end: the tokenizer, the routes, the libraries. The collector need not search it again
    # and again, which would stop every stream for a tenth of a second.
    gc.collect()
    gc.freeze()
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,  # uvicorn's records go where all others go
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # longer than the usual 60 s of proxies, so that they close first
            timeout_graceful_shutdown=_CLOSE_SECONDS,
            http=connections(config.client_seconds, limit=_room(config.max_connections)),
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
    )
    signals = _Signals()
    with signals.caught():
        serving = asyncio.create_task(server.serve(sockets=[listener]), name="http server")
        watching = asyncio.create_task(_watch(engine, config, listener), name="engine watch")
        leaving = asyncio.create_task(signals.first.wait(), name="first signal")
        await asyncio.wait((serving, watching, leaving), return_when=asyncio.FIRST_COMPLETED)
        failure = watching.exception() if watching.done() else None
        watching.cancel()
        if leaving.done():
            await _drain(app.state.lifecycle, signals, config)
        leaving.cancel()
        await engine.stop()  # requests that still run get their last event
        server.should_exit = True
        await serving
    if failure is not None:
        raise failure
    return 0


async def _watch(engine: Engine, config: ServerConfig, listener: socket.socket) -> None:
    """Show the progress of loading, and say when the engine takes requests, for the first time or again.

    Raises:
        ServeError: the engine has failed and will not start again.
    """
    await _loaded(engine, config.log_format)
    model = engine.status.model
    random = model is not None and model.random_weights
    line = greeting(
        config.model_name,
        *(("localhost", 0) if config.uds is not None else listener.getsockname()[:2]),
        uds=config.uds,
        random_weights=random,
        asks_key=config.keys is not None,
        tls=config.ssl_certfile is not None,
    )
    if config.log_format == "json":
        _log.info("%s", line.partition(" - try: ")[0])
    else:
        with contextlib.suppress(OSError):  # nobody reads it
            print(line, flush=True)
    while True:
        while engine.status.state is EngineState.READY:  # noqa: ASYNC110 - the engine only offers a snapshot
            await asyncio.sleep(_POLL_SECONDS)
        await _loaded(engine, config.log_format)
        _log.warning("the engine is ready again")


async def _loaded(engine: Engine, log_format: LogFormat) -> None:
    with _stages(log_format) as stages:
        while (status := engine.status).state is not EngineState.READY:
            if status.state is EngineState.FAILED:
                raise ServeError(status.message)
            if status.loading is not None:
                stages(status.loading.stage, status.loading.done, status.loading.total)
            await asyncio.sleep(_POLL_SECONDS)


def _after_ctrl_c() -> None:
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(file=sys.stderr, flush=True)  # end the line in which the terminal shows ^C


def _stages(log_format: LogFormat) -> Stages:
    if log_format == "json":
        return Stages(say=lambda line: _log.info("%s", line))
    # On a terminal there is a bar. Else the lines go where the log goes, which never waits.
    return Stages(say=None if sys.stderr.isatty() else lambda line: _log.warning("%s", line))


async def _drain(lifecycle: Lifecycle, signals: _Signals, config: ServerConfig) -> None:
    seconds = config.drain_seconds
    lifecycle.begin_drain()
    _after_ctrl_c()
    if not (count := lifecycle.active_requests):
        return
    who = "1 request has" if count == 1 else f"{count} requests have"
    _log.warning("stopping: %s up to %g s to finish; a second signal ends them now", who, seconds)
    idle = asyncio.create_task(lifecycle.wait_idle(seconds))
    second = asyncio.create_task(signals.second.wait())
    await asyncio.wait((idle, second), return_when=asyncio.FIRST_COMPLETED)
    if second.done():
        _after_ctrl_c()
    for task in (idle, second):
        task.cancel()


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The event loop of uvloop; None if it is not installed, as it is not made for every platform."""
    if importlib.util.find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


def greeting(
    model: str,
    host: str,
    port: int,
    *,
    random_weights: bool = False,
    asks_key: bool = False,
    tls: bool = False,
    uds: str | None = None,
) -> str:
    """One line with the address and a command to try; a model with random weights may have no chat format."""
    options = " -H 'authorization: Bearer KEY'" if asks_key else ""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    url = f"{'https' if tls else 'http'}://{host}:{port}"
    where = url
    if uds is not None:
        where, url = uds, url.partition(":")[0] + "://localhost"
        options += f" --unix-socket {shlex.quote(uds)}"
    body: dict[str, Any] = {"model": model}
    if random_weights:
        path = "/v1/completions"
        body |= {"prompt": [1, 2, 3], "max_tokens": 16, "ignore_eos": True}
    else:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    text = json.dumps(body | {"temperature": 0}).replace("'", "'\\''")
    return (
        f"ready at {where} - try: curl {url}{path}{options} -H 'content-type: application/json' -d '{text}'"
    )


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """Counts the signals SIGTERM and SIGINT: `first` and `second` are set when they come."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._count)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _count(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
