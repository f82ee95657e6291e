"""Conversations to prompts, and answers to their parts. One module a format and one line in `FORMATS`."""

from __future__ import annotations

import importlib
from pathlib import Path

from server.chat.detect import detect
from server.chat.errors import PromptError
from server.chat.format import ChatFormat
from server.chat.guard import encode_chat
from server.text.tokenizer import Tokenizer

__all__ = ["FORMATS", "ChatFormat", "PromptError", "choose", "encode_chat", "load_chat_format"]

FORMATS: dict[str, str] = {
    "jinja": "server.chat.jinja:build",  # the template that comes with the checkpoint
    "deepseek-v3.1": "server.chat.deepseek_v31:build",  # also V3.1-Terminus and V3.2-Exp
    "deepseek-v3.2": "server.chat.deepseek_v32:build",
}
"""Name to builder, imported when asked for. A builder takes the weights' path and the tokenizer."""


def choose(weights: Path, name: str) -> tuple[str, str]:
    """Return a format's name, `auto` decided, and why, in a few words.

    Raises:
        PromptError: the name is unknown, or the checkpoint's files are damaged.
    """
    if name == "auto":
        return detect(weights)
    if name not in FORMATS:
        raise PromptError(f"there is no chat format {name!r}; there are auto, {', '.join(FORMATS)}")
    return name, "as set"


def load_chat_format(weights: Path, name: str = "auto", tokenizer: Tokenizer | None = None) -> ChatFormat:
    """Build a chat format for a checkpoint: a .gguf file or a folder.

    Args:
        weights: the checkpoint.
        name: one of `FORMATS`, or `auto`.
        tokenizer: the vocabulary, to check that it has what the format writes.

    Raises:
        PromptError: the name is unknown, or the format does not fit the checkpoint, or its files are damaged.
    """
    name, _ = choose(weights, name)
    module, _, attribute = FORMATS[name].partition(":")
    chat_format: ChatFormat = getattr(importlib.import_module(module), attribute)(weights, tokenizer)
    return chat_format
