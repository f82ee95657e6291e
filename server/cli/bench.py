"""`dsa bench`: reads the flags and hands over to `lab.bench`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from server.cli.curve import curve
from server.settings import Settings

if TYPE_CHECKING:
    from lab.bench.suites import Suite

bench = typer.Typer(
    help="Measure speed, of this server or of several side by side.\n\n"
    "Each suite asks over OpenAI's streaming HTTP interface and reads the times of events as a client sees them. "
    "Several servers are asked in turn, request by request, with prompts of the same lengths. "
    "Without --endpoint and --serve, a `dsa serve` of MODEL is started and measured alone.\n\n"
    "dsa bench decode --cpus 1 --serve 'dsa=dsa serve --port {port}' "
    "--serve 'llama.cpp=llama-server -m MODEL.gguf --port {port}'",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

bench.command()(curve)

_MODEL = Settings().model
_WHAT, _WHO, _HOW = "What is measured", "Who is measured", "How"

Model = Annotated[
    str,
    typer.Argument(
        help="What the servers serve, for its tokenizer: a name that dsa can fetch, a .gguf file, or a folder."
    ),
]
Endpoints = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint", metavar="NAME=URL", help="A server that runs, as llama.cpp=http://127.0.0.1:8080; may be repeated.",
        show_default=False, rich_help_panel=_WHO,
    ),
]  # fmt: skip
Serves = Annotated[
    list[str] | None,
    typer.Option(
        "--serve", metavar="NAME=COMMAND",
        help="A server to start, and stop in the end; {port} in the command becomes a free port; may be repeated.",
        show_default=False, rich_help_panel=_WHO,
    ),
]  # fmt: skip
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--fields", metavar="NAME=JSON",
        help="More fields of the requests to one server, as 'dense={\"dsa\": {\"top_k\": \"dense\"}}'; null leaves one out.",
        show_default=False, rich_help_panel=_WHO,
    ),
]  # fmt: skip
Own = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Which one is compared with the best of the others.", show_default="the first",
        rich_help_panel=_WHO,
    ),
]  # fmt: skip
Cpus = Annotated[
    str | None,
    typer.Option(
        metavar="LIST", help="Cores that started servers share, as 1 or 2-3; this program takes the others.",
        show_default="any", rich_help_panel=_HOW,
    ),
]  # fmt: skip
AsText = Annotated[
    bool,
    typer.Option(
        "--text", help="Send prompts as text, where a server takes no token ids.", rich_help_panel=_HOW
    ),
]
StartSeconds = Annotated[
    float, typer.Option(min=1, help="How long a server may take to start.", rich_help_panel=_HOW)
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="DIR", help="Where SUITE.json, SUITE.png and the servers' logs go.", rich_help_panel=_HOW
    ),
]
Rounds = Annotated[
    int, typer.Option(min=1, help="Samples of each case of each server.", rich_help_panel=_HOW)
]
_OUT = Path("bench")
_WIDTH = 120
"""Columns where there is no terminal."""
_START_SECONDS = 600.0


def _sizes(what: str) -> Any:
    return typer.Option(metavar="N,N", help=what, rich_help_panel=_WHAT)


Tokens = Annotated[int, typer.Option(min=2, help="Tokens of each answer.", rich_help_panel=_WHAT)]
Context = Annotated[int, typer.Option(min=8, help="Tokens of each prompt.", rich_help_panel=_WHAT)]


@bench.command()
def decode(
    model: Model = _MODEL,
    contexts: Annotated[str, _sizes("Tokens of the prompts.")] = "128,2048,7168",
    tokens: Tokens = 64,
    rounds: Rounds = 5,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """Tokens a second of one stream, by context."""
    from lab.bench.suites import Decode

    suite = Decode(_numbers(contexts, "--contexts"), tokens)
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


@bench.command()
def prefill(
    model: Model = _MODEL,
    lengths: Annotated[str, _sizes("Tokens of the prompts.")] = "512,2048,7168",
    rounds: Rounds = 5,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """Prompt tokens a second of one stream, by length; nothing of it cached."""
    from lab.bench.suites import Prefill

    suite = Prefill(_numbers(lengths, "--lengths"))
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


@bench.command()
def concurrency(
    model: Model = _MODEL,
    streams: Annotated[str, _sizes("Requests at once.")] = "1,2,4,8,16,32",
    context: Context = 1024,
    tokens: Tokens = 128,
    rounds: Rounds = 3,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """Tokens a second of many streams together, and whether one of them has to wait."""
    from lab.bench.suites import Concurrency

    suite = Concurrency(_numbers(streams, "--streams"), context, tokens)
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


@bench.command()
def prefix(
    model: Model = _MODEL,
    prefixes: Annotated[str, _sizes("Tokens that two prompts have in common.")] = "7168",
    tail: Annotated[int, typer.Option(min=1, help="Tokens that they have not.", rich_help_panel=_WHAT)] = 512,
    rounds: Rounds = 5,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """Time to the first token behind a cached prefix, against a cold prompt."""
    from lab.bench.suites import Prefix

    suite = Prefix(_numbers(prefixes, "--prefixes"), tail)
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


@bench.command("long")
def long_context(
    model: Model = _MODEL,
    contexts: Annotated[str, _sizes("Tokens of the prompts.")] = "1024,2048,4096,6144,8000",
    tokens: Tokens = 64,
    rounds: Rounds = 3,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """Whole requests, cold, up to all that the default model's context holds."""
    from lab.bench.suites import Long

    suite = Long(_numbers(contexts, "--contexts"), tokens)
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


@bench.command()
def overhead(
    model: Model = _MODEL,
    streams: Annotated[str, _sizes("Requests at once.")] = "1,8",
    context: Context = 1024,
    tokens: Tokens = 128,
    rounds: Rounds = 5,
    endpoint: Endpoints = None,
    serve: Serves = None,
    fields: Fields = None,
    own: Own = None,
    cpus: Cpus = None,
    text: AsText = False,
    start_seconds: StartSeconds = _START_SECONDS,
    out: Out = _OUT,
) -> None:
    """What the server costs: streams over HTTP, and the same engine driven in process."""
    from lab.bench.inprocess import Overhead

    suite = Overhead(_numbers(streams, "--streams"), context, tokens)
    _run([suite], model, rounds, endpoint, serve, fields, own, cpus, text, start_seconds, out)


def _run(
    suites: list[Suite],
    model: str,
    rounds: int,
    endpoint: list[str] | None,
    serve: list[str] | None,
    fields: list[str] | None,
    own: str | None,
    cpus: str | None,
    text: bool,
    start_seconds: float,
    out: Path,
) -> None:
    from rich.console import Console

    from lab.bench.errors import BenchError
    from lab.bench.run import Plan, run
    from server.hub.models import ModelError, resolve
    from server.hub.stages import Stages
    from server.text.tokenizer import TokenizerError

    endpoints, commands = _pairs(endpoint, "--endpoint", "NAME=URL"), _pairs(serve, "--serve", "NAME=COMMAND")
    if not endpoints and not commands:
        commands = {"dsa": _own_command(model)}
    names = [*endpoints, *commands]
    if twice := set(endpoints) & set(commands):
        _fail(f"{min(twice)!r} is named by --endpoint and by --serve; give each server a name of its own", 2)
    more = {name: _json(name, value) for name, value in _pairs(fields, "--fields", "NAME=JSON").items()}
    for name in [*more, *([own] if own is not None else [])]:
        if name not in names:
            _fail(f"{name!r} is none of the servers; there are {', '.join(names)}", 2)
    cores = _cores(cpus)
    if endpoints and cores is not None and not commands:
        _fail("--cpus is for servers that --serve starts, but --endpoint names running ones", 2)
    try:
        with Stages() as stages:
            files = resolve(model, report=stages)
        plan = Plan(
            suites=tuple(suites), endpoints=endpoints, commands=commands, own=own or names[0], fields=more,
            files=files, rounds=rounds, cpus=cores, as_text=text, out=out, start_seconds=start_seconds,
            command=shlex.join(["dsa", *sys.argv[1:]]),
        )  # fmt: skip
        run(plan, Console(width=None if sys.stdout.isatty() else _WIDTH))
    except (ModelError, BenchError, TokenizerError, OSError) as error:
        _fail(str(error))


def _own_command(model: str) -> str:
    """A server of this very program; measurements are nobody's usage, so no ledger is kept."""
    start = [sys.executable, "-c", "from server.cli.main import main; main()", "serve", model]
    return shlex.join([*start, "--host", "127.0.0.1", "--ledger", "none"]) + " --port {port}"


def _numbers(text: str, flag: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        _fail(f"{flag} is {text!r}; expected positive numbers, such as 128,2048", 2)
    return tuple(dict.fromkeys(sorted(map(int, parts))))


def _pairs(values: list[str] | None, flag: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not (name and equals and rest) or "/" in name:
            _fail(f"{flag} is {value!r}; expected {form}", 2)
        if name in found:
            _fail(f"{flag} names {name!r} twice; give each server a name of its own", 2)
        found[name] = rest
    return found


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        _fail(f"--fields of {name} is {text!r}; expected a JSON object", 2)
    return value


def _cores(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            _fail(f"--cpus is {text!r}; expected cores, such as 1 or 0,2-3", 2)
        cores += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(cores))


def _fail(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)
