"""The command line of `dsa bench`: one command for each suite. All commands share the flags of `_measure`."""

from __future__ import annotations

import inspect
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.bench.errors import BenchError
from lab.bench.inprocess import Overhead
from lab.bench.servers import cores
from lab.bench.suites import Concurrency, Decode, Long, Prefill, Prefix, Suite
from lab.curve.__main__ import curve
from lab.tool import DSA, fail, find, numbers, program, start
from server.hub.models import DEFAULT_MODEL

app = program(
    "Measure speed, of this server or of several side by side.\n\n"
    "Each suite sends requests over OpenAI's streaming HTTP interface and notes the times of events as a client sees "
    "them. Several servers are asked in turn, request by request, with prompts of the same lengths. "
    "Without --endpoint and --serve, a `dsa serve` of MODEL is started and measured alone.\n\n"
    "dsa bench decode --cpus 1 --serve 'dsa=dsa serve --port {port}' "
    "--serve 'llama.cpp=llama-server -m MODEL.gguf --port {port}'"
)
app.command()(curve)

_WHAT, _WHO, _HOW = "What is measured", "Who is measured", "How"
_WIDTH = 120
"""Columns of the output if it is not a terminal."""


def _sizes(what: str) -> Any:
    return typer.Option(metavar="N,N", help=what, rich_help_panel=_WHAT)


TokensFlag = Annotated[int, typer.Option(min=2, help="Tokens of each answer.", rich_help_panel=_WHAT)]
ContextFlag = Annotated[int, typer.Option(min=8, help="Tokens of each prompt.", rich_help_panel=_WHAT)]
ContextsFlag = Annotated[str, _sizes("Tokens of the prompts.")]
StreamsFlag = Annotated[str, _sizes("Requests at once.")]


def _suite(name: str, rounds: int) -> Callable[[Callable[..., Suite]], Callable[..., Suite]]:
    """Turn a function that makes a suite into a command. It has the function's flags and those of `_measure`."""

    def add(make: Callable[..., Suite]) -> Callable[..., Suite]:
        own = dict(inspect.signature(make, eval_str=True).parameters)
        common = dict(inspect.signature(_measure, eval_str=True).parameters)
        common["rounds"] = common["rounds"].replace(default=rounds)
        del common["suite"]
        ordered = [common.pop("model"), *own.values(), *common.values()]

        def command(**given: Any) -> None:
            suite = make(**{flag: given.pop(flag) for flag in own})
            _measure(suite=suite, **given)

        command.__doc__ = make.__doc__
        command.__annotations__ = {one.name: one.annotation for one in ordered}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in ordered]
        )
        app.command(name)(command)
        return make

    return add


def _measure(
    *,
    ctx: typer.Context,
    suite: Any,
    model: Annotated[
        str,
        typer.Argument(
            help="The model that the servers serve, for its tokenizer: a name, a .gguf file, or a folder."
        ),
    ] = DEFAULT_MODEL,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=URL",
            help="A running server, such as llama.cpp=http://127.0.0.1:8080; may be repeated.",
            show_default=False, rich_help_panel=_WHO,
        ),
    ] = None,
    serve: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COMMAND",
            help="A server to start and, at the end, stop; {port} becomes a free port; may be repeated.",
            show_default=False, rich_help_panel=_WHO,
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=JSON",
            help="More fields of the requests to a server, such as 'dense={\"dsa\": {\"top_k\": \"dense\"}}'; null leaves a field out.",
            show_default=False, rich_help_panel=_WHO,
        ),
    ] = None,
    own: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The server to compare with the best of the others.", show_default="the first",
            rich_help_panel=_WHO,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Samples of each case of each server.", rich_help_panel=_HOW)
    ] = 5,
    cpus: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Cores for started servers, such as 1 or 2-3; this program uses the others.",
            show_default="any", rich_help_panel=_HOW,
        ),
    ] = None,
    text: Annotated[
        bool,
        typer.Option("--text", help="Send prompts as text, for servers that take no token ids.", rich_help_panel=_HOW),
    ] = False,
    start_seconds: Annotated[
        float, typer.Option(min=1, help="How long a server may take to start.", rich_help_panel=_HOW)
    ] = 600.0,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder for SUITE.json, SUITE.png and the servers' logs.", rich_help_panel=_HOW
        ),
    ] = Path("bench"),
) -> None:  # fmt: skip
    from rich.console import Console

    from lab.bench.run import BenchPlan, run

    endpoints, commands = _pairs(endpoint, "--endpoint", "NAME=URL"), _pairs(serve, "--serve", "NAME=COMMAND")
    if not endpoints and not commands:
        # Measurements are nobody's usage, so no ledger is kept.
        own_server = shlex.join([*DSA, "serve", model, "--host", "127.0.0.1", "--ledger", "none"])
        commands = {"dsa": own_server + " --port {port}"}
    names = [*endpoints, *commands]
    if twice := set(endpoints) & set(commands):
        fail(f"{min(twice)!r} is named by --endpoint and by --serve; give each server a name of its own")
    more = {name: _json(name, value) for name, value in _pairs(fields, "--fields", "NAME=JSON").items()}
    for name in [*more, *([own] if own is not None else [])]:
        if name not in names:
            fail(f"{name!r} is none of the servers; there are {', '.join(names)}")
    try:
        pinned_to = None if cpus is None else cores(cpus)
    except BenchError as error:
        fail(str(error))
    if endpoints and cpus is not None and not commands:
        fail("--cpus is for servers that --serve starts, but --endpoint names running ones")
    plan = BenchPlan(
        suites=(suite,), endpoints=endpoints, commands=commands, own=own or names[0], fields=more,
        files=find(model), rounds=rounds, cpus=pinned_to, as_text=text, out=out, start_seconds=start_seconds,
        command=ctx.obj,
    )  # fmt: skip
    run(plan, Console(width=None if sys.stdout.isatty() else _WIDTH))


@_suite("decode", rounds=5)
def decode(contexts: ContextsFlag = "128,2048,7168", tokens: TokensFlag = 64) -> Suite:
    """Tokens a second of one stream, by context."""
    return Decode(_numbers("--contexts", contexts), tokens)


@_suite("prefill", rounds=5)
def prefill(lengths: ContextsFlag = "512,2048,7168") -> Suite:
    """Prompt tokens a second of one stream, by length, without a cached prefix."""
    return Prefill(_numbers("--lengths", lengths))


@_suite("concurrency", rounds=3)
def concurrency(
    streams: StreamsFlag = "1,2,4,8,16,32", context: ContextFlag = 1024, tokens: TokensFlag = 128
) -> Suite:
    """Tokens a second of many streams together, and whether a stream has to wait."""
    return Concurrency(_numbers("--streams", streams), context, tokens)


@_suite("prefix", rounds=5)
def prefix(
    prefixes: Annotated[str, _sizes("Tokens that both prompts begin with.")] = "7168",
    tail: Annotated[
        int, typer.Option(min=1, help="Tokens of each prompt after these.", rich_help_panel=_WHAT)
    ] = 512,
) -> Suite:
    """Time to the first token after a cached prefix, compared with a cold prompt."""
    return Prefix(_numbers("--prefixes", prefixes), tail)


@_suite("long", rounds=3)
def long_context(contexts: ContextsFlag = "1024,2048,4096,6144,8000", tokens: TokensFlag = 64) -> Suite:
    """Whole cold requests, up to the default model's whole context."""
    return Long(_numbers("--contexts", contexts), tokens)


@_suite("overhead", rounds=5)
def overhead(streams: StreamsFlag = "1,8", context: ContextFlag = 1024, tokens: TokensFlag = 128) -> Suite:
    """The cost of the server: streams over HTTP, and through the same engine in process."""
    return Overhead(_numbers("--streams", streams), context, tokens)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    return tuple(sorted(numbers(flag, text, "positive numbers, such as 128,2048")))


def _pairs(values: list[str] | None, flag: str, form: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not (name and equals and rest) or "/" in name:
            fail(f"{flag} is {value!r}; expected {form}")
        if name in found:
            fail(f"{flag} names {name!r} twice; give each server a name of its own")
        found[name] = rest
    return found


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return (
        value if isinstance(value, dict) else fail(f"--fields of {name} is {text!r}; expected a JSON object")
    )


if __name__ == "__main__":
    sys.exit(start(app, "bench"))
