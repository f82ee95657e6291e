"""`dsa chat`: a conversation with a running server, in a terminal or over a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer

from server.cli.options import fail

_TIMEOUT = httpx.Timeout(connect=5, read=300, write=30, pool=5)


class ChatClientError(Exception):
    """The server cannot be reached, or refuses a request; the message says what to do."""


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
    key: Annotated[
        str | None,
        typer.Option(
            metavar="SECRET",
            envvar="DSA_API_KEY",
            show_default="none",
            help="Of a server that asks for a key.",
        ),
    ] = None,
) -> None:
    """Talk to a running server. /clear forgets the conversation, /quit leaves."""
    if top_k is not None and top_k != "dense" and not (top_k.isdigit() and int(top_k)):
        fail(f"--top-k is {top_k!r}; expected a number of tokens, or dense", 2)
    sparsity = int(top_k) if top_k is not None and top_k.isdigit() else top_k
    try:
        talk(url, model=model, top_k=sparsity, temperature=temperature, key=key)
    except ChatClientError as error:
        fail(error)


def talk(
    url: str, *, model: str | None, top_k: int | str | None, temperature: float, key: str | None = None
) -> None:
    """Read messages from standard input and print the answers as they come.

    Raises:
        ChatClientError: the server cannot be reached, or refuses the first request.
    """
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, timeout=_TIMEOUT, headers=headers) as client:
        options: dict[str, Any] = {"model": model or _first_model(client, url), "temperature": temperature}
        if top_k is not None:
            options["dsa"] = {"top_k": top_k}
        interactive = sys.stdin.isatty()
        if interactive:
            print(f"talking to {options['model']} at {url}; /clear forgets the conversation, /quit leaves")
            import readline  # noqa: F401 - makes input() editable
        messages: list[dict[str, str]] = []
        for line in _lines(interactive):
            if line == "/quit":
                return
            if line == "/clear":
                messages.clear()
                continue
            if line.startswith("/"):
                print(f"there is no command {line.split()[0]}; there are /clear and /quit", file=sys.stderr)
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(client, options | {"messages": messages})
            except ChatClientError as error:
                if not interactive:
                    raise
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer})


def _first_model(client: httpx.Client, url: str) -> str:
    try:
        response = client.get("/v1/models")
        if response.is_error:
            raise ChatClientError(_reason(response))
        return str(response.json()["data"][0]["id"])
    except httpx.InvalidURL as error:
        raise ChatClientError(f"{url!r} is not the address of a server: {error}") from error
    except httpx.HTTPError as error:
        raise ChatClientError(
            f"there is no server at {url} ({error}); start one with `make serve`"
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ChatClientError(f"what answers at {url} is not a dsa server") from error


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if line:
            yield line


def _answer(client: httpx.Client, body: dict[str, Any]) -> str:
    """Print an answer while it arrives, and return it. Ctrl-C ends it early."""
    text: list[str] = []
    try:
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            if response.is_error:
                response.read()
                raise ChatClientError(_reason(response))
            for piece in _pieces(response):
                print(piece, end="", flush=True)
                text.append(piece)
    except httpx.HTTPError as error:
        raise ChatClientError(f"the server went away ({error}); look at what it printed") from error
    except KeyboardInterrupt:
        pass  # the connection is closed, so the server stops generating
    print()
    return "".join(text)


def _pieces(response: httpx.Response) -> Iterator[str]:
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ChatClientError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"the server answered {response.status_code} {response.reason_phrase}"
