"""Writes conversations as prompts, and reads answers into parts. A format is one module and one line in `FORMATS`."""

from __future__ import annotations

import importlib
from pathlib import Path

from server.chat.detect import detect
from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.chat.guard import encode_chat
from server.text.tokenizer import Tokenizer

__all__ = [
    "FORMATS",
    "ChatFormat",
    "PromptError",
    "choose",
    "choose_tool_format",
    "encode_chat",
    "load_chat_format",
]

FORMATS: dict[str, str] = {
    "jinja": "server.chat.template:build",  # the template that comes with the checkpoint
    "deepseek-v3.1": "server.chat.deepseek_v31:build",  # also V3.1-Terminus and V3.2-Exp
    "deepseek-v3.2": "server.chat.deepseek_v32:build",
}
"""Name of a format -> its builder, which is imported when needed: (path of the weights, tokenizer) -> ChatFormat."""


def choose(weights: Path, name: str) -> tuple[str, str]:
    """Return the name of the format to use, and the reason in a few words. `auto` is decided from the files.

    Raises:
        PromptError: the name is unknown, or the checkpoint's files are damaged.
    """
    if name == "auto":
        return detect(weights)
    if name not in FORMATS:
        raise PromptError(f"there is no chat format {name!r}; there are auto, {', '.join(FORMATS)}")
    return name, "as set"


def choose_tool_format(weights: Path, chat_format: str, name: str = "auto") -> tuple[str, str]:
    """Return the name of the way in which a chat format's calls are written, and the reason in a few words.

    Raises:
        PromptError: the name is unknown, or the chat format has its own calls.
    """
    if chat_format == "jinja":
        from server.chat.template import tool_format_of

        return tool_format_of(weights, name)
    if name != "auto":
        raise PromptError(f"the chat format {chat_format} has its own form of calls; leave --tool-format out")
    return chat_format, "the chat format's own"


def load_chat_format(
    weights: Path, name: str = "auto", tokenizer: Tokenizer | None = None, *, tool_format: str = "auto"
) -> ChatFormat:
    """Build the chat format of a checkpoint.

    Args:
        weights: the checkpoint: a .gguf file or a folder.
        name: one of `FORMATS`, or `auto`.
        tokenizer: the model's; if given, the format's control tokens are checked against it.
        tool_format: how the model of a checkpoint's own template writes calls: `auto`, `none`, or one of
            `server.chat.template.TOOL_FORMATS`.

    Raises:
        PromptError: the name is unknown, or the format does not fit the checkpoint, or its files are damaged.
    """
    name, _ = choose(weights, name)
    choose_tool_format(weights, name, tool_format)
    options = {"tool_format": tool_format} if name == "jinja" else {}
    module, _, attribute = FORMATS[name].partition(":")
    chat_format: ChatFormat = getattr(importlib.import_module(module), attribute)(
        weights, tokenizer, **options
    )
    return chat_format
