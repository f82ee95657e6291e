"""Runs the chat template that comes with a checkpoint, in a sandbox. A request cannot bring a template.

The environment (trimmed blocks, `raise_exception`, `tojson`, `strftime_now`, loop controls) is the one that
published templates are written for.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser as TemplateParser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.chat.parsing import PlainParser, ThinkingParser
from server.chat.parts import Parser
from server.text.gguf import GGUFError, read_metadata
from server.text.loading import read_json, token_content
from server.text.tokenizer import TokenizerError

_SWITCHES = ("thinking", "enable_thinking")
"""The names that templates use for the switch that turns reasoning on."""

_OWN = frozenset(
    (*_SWITCHES, "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
) | frozenset(("bos_token", "eos_token", "unk_token", "pad_token"))
"""Names of variables that other fields set, or none."""

_PROBE = "speaker7f3a"
"""A name that no template writes by itself."""

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class JinjaFormat(ChatFormat):
    """A compiled template and the names of the control tokens that it may use.

    Args:
        template: the template's source.
        tokens: name in templates (`bos_token`, ...) -> text of the control token.
        reasons: the vocabulary has <think> and </think>.
    """

    def __init__(
        self, template: str, tokens: Mapping[str, str] | None = None, *, reasons: bool = False
    ) -> None:
        self._tokens = dict(tokens or {})
        self._values: Mapping[str, Any] = {}
        self.source = template
        self.reasons = reasons
        environment = _environment()
        try:
            self._template: Template = environment.from_string(template)
            names = meta.find_undeclared_variables(environment.parse(template))
            self.thinking = reasons and not names.isdisjoint(_SWITCHES)
            self.variables = frozenset(names - _OWN - self._tokens.keys())
        except TemplateError as error:
            raise PromptError(f"the checkpoint's chat template is not valid: {_reason(error)}") from error
        self.names = self._writes_names()

    def _writes_names(self) -> bool:
        """Whether the name of a message is in the prompt."""
        with contextlib.suppress(PromptError):
            probe = [{"role": "user", "content": "hi", "name": _PROBE}]
            return _PROBE in JinjaFormat.render(self, probe)  # a subclass is not whole yet
        return False

    def with_variables(self, values: Mapping[str, Any]) -> JinjaFormat:
        """The format with some of the template's variables set."""
        if not values:
            return self
        changed = copy.copy(self)
        changed._values = values
        return changed

    def writes_role(self, role: str) -> bool:
        """Whether the template writes this role as it is."""
        with contextlib.suppress(PromptError):
            probe = [{"role": "user", "content": "hi"}, {"role": role, "content": _PROBE}]
            text = JinjaFormat.render(self, probe)
            return role in text and _PROBE in text
        return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text.

        Raises:
            PromptError: the template refuses these messages or does not know what to do with them.
        """
        if not messages:
            raise PromptError("messages must hold at least one message")
        flat = [_flat(message) for message in messages]
        switches = {} if thinking is None else dict.fromkeys(_SWITCHES, thinking)
        try:
            return self._template.render(
                messages=flat,
                add_generation_prompt=add_generation_prompt,
                tools=list(tools) or None,
                documents=None,
                **self._values,
                **switches,
                **self._tokens,
            )
        except PromptError:
            raise
        # A template is a program. Given messages that it was not written for, it can raise any error.
        except Exception as error:
            raise PromptError(
                f"the model's chat template cannot write these messages: {_reason(error)}"
            ) from error

    def parser(
        self, *, tools: Collection[str] | None = None, thinking: bool = False, single: bool = False
    ) -> Parser:
        """Return a new parser for one answer; it reads reasoning if the vocabulary has the markers."""
        return ThinkingParser(thinking=thinking) if self.reasons else PlainParser()


class NoTemplate(ChatFormat):
    """The format of a checkpoint without a chat template: it refuses every conversation."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Refuse the messages.

        Raises:
            PromptError: always.
        """
        raise PromptError("this model has no chat template; send a plain prompt to /v1/completions instead")


def read_template(weights: Path) -> tuple[str | None, dict[str, str]]:
    """Return a checkpoint's template (None if it has none) and its control tokens, by their name in templates.

    Raises:
        PromptError: the files are damaged.
    """
    try:
        return _from_gguf(weights) if weights.is_file() else _from_folder(weights)
    except (GGUFError, TokenizerError, OSError) as error:
        raise PromptError(str(error)) from error


def _from_gguf(path: Path) -> tuple[str | None, dict[str, str]]:
    metadata = read_metadata(path)
    vocabulary = metadata.get("tokenizer.ggml.tokens", [])
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    tokens = {
        name: vocabulary[index]
        for name, index in ids.items()
        if index is not None and index < len(vocabulary)
    }
    return metadata.get("tokenizer.chat_template"), tokens


def _from_folder(folder: Path) -> tuple[str | None, dict[str, str]]:
    config = read_json(folder / "tokenizer_config.json")
    contents = {name: token_content(config.get(name)) for name in _TOKEN_NAMES}
    tokens = {name: content for name, content in contents.items() if content is not None}
    own_file = folder / "chat_template.jinja"
    template = own_file.read_text("utf-8") if own_file.is_file() else config.get("chat_template")
    if isinstance(template, list):  # several templates, each with a name
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template, tokens


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training. A prompt has its body as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own form

    def parse(self, parser: TemplateParser) -> nodes.Node:
        """Read one block."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, >, & and ' for HTML, but models were trained on text without these escapes.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise PromptError(f"the model's chat template refuses these messages: {message}")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message with content that is one string: a list of text parts is joined, one part a line."""
    content = message.get("content")
    if not isinstance(content, Sequence) or isinstance(content, str):
        return dict(message)
    for part in content:
        if (
            not isinstance(part, Mapping)
            or part.get("type") != "text"
            or not isinstance(part.get("text"), str)
        ):
            raise PromptError("a message's content must be text, or a list of parts of type 'text'")
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")
