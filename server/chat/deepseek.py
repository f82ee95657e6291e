"""What the formats of the DeepSeek-V3 family share: control tokens, and readers of OpenAI's messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.chat.errors import PromptError
from server.text.tokenizer import Tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


def require_tokens(name: str, tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """Check at start that a vocabulary has the tokens that a format writes.

    Raises:
        PromptError: a token is missing, or is not a control token.
    """
    missing = [token for token in tokens if token not in tokenizer.control_tokens]
    if missing:
        raise PromptError(
            f"the chat format {name} writes {', '.join(missing)}, which this model's vocabulary does not have; "
            "choose another with --chat-format"
        )


def text_of(message: Mapping[str, Any]) -> str:
    """A message's content; "" if it is null."""
    return str(message.get("content") or "")


def calls_of(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The calls of an assistant's message, each as its `function` object with `name` and `arguments`."""
    return [call["function"] for call in message.get("tool_calls") or ()]
