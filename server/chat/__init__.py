"""Chat messages to a prompt. One module a format and one line in `FORMATS`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from server.chat.errors import PromptError
from server.chat.guard import encode_chat

__all__ = ["FORMATS", "ChatFormat", "PromptError", "encode_chat", "load_chat_format"]

Messages = Sequence[Mapping[str, Any]]


class ChatFormat(Protocol):
    """One way of writing a conversation as a prompt."""

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Return the prompt's text, control tokens written out.

        Raises:
            PromptError: the format cannot express these messages; the message says why.
        """
        ...


FORMATS: dict[str, str] = {
    "jinja": "server.chat.jinja:build",  # the template that comes with the checkpoint
}
"""Name to builder, imported when asked for. A builder takes the weights' path."""


def load_chat_format(weights: Path, name: str = "jinja") -> ChatFormat:
    """Build a chat format for a checkpoint: a .gguf file or a folder.

    Raises:
        PromptError: the name is unknown, or the checkpoint's template is damaged.
    """
    if name not in FORMATS:
        raise PromptError(f"there is no chat format {name!r}; there are {', '.join(FORMATS)}")
    module, _, attribute = FORMATS[name].partition(":")
    chat_format: ChatFormat = getattr(importlib.import_module(module), attribute)(weights)
    return chat_format
