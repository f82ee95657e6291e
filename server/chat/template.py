"""Chooses how a checkpoint's own chat template is served: with tool calls if it is one that is known to have them."""

from __future__ import annotations

from pathlib import Path

from server.chat.hermes import HermesFormat, is_hermes
from server.chat.jinja import JinjaFormat, NoTemplate, read_template
from server.chat.parsing import THINK, THOUGHT
from server.text.tokenizer import Tokenizer


def build(weights: Path, tokenizer: Tokenizer | None = None) -> JinjaFormat | NoTemplate:
    """Read the template of a .gguf file or of a checkpoint folder.

    Raises:
        PromptError: the files are damaged.
    """
    template, tokens = read_template(weights)
    reasons = tokenizer is not None and {THINK, THOUGHT} <= tokenizer.control_tokens.keys()
    if template is None:
        return NoTemplate()
    return (HermesFormat if is_hermes(template) else JinjaFormat)(template, tokens, reasons=reasons)
