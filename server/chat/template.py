"""Chooses how a checkpoint's own chat template is served: how its model writes calls."""

from __future__ import annotations

import re
from pathlib import Path

from server.chat.errors import PromptError
from server.chat.hermes import HermesFormat, is_hermes
from server.chat.jinja import JinjaFormat, NoTemplate, read_template
from server.chat.llama_json import LlamaJsonFormat, is_llama_json
from server.chat.mistral import MistralFormat, is_mistral
from server.chat.parsing import THINK, THOUGHT
from server.chat.pythonic import PythonicFormat, is_pythonic
from server.chat.tagged import GlmFormat, QwenCoderFormat, is_glm, is_qwen_coder
from server.chat.tool_template import ToolTemplate
from server.text.tokenizer import Tokenizer

TOOL_FORMATS: dict[str, type[ToolTemplate]] = {
    "hermes": HermesFormat,  # Qwen 2.5, Qwen 3, Hermes
    "llama-json": LlamaJsonFormat,  # Llama 3.1, 3.2, 3.3
    "pythonic": PythonicFormat,  # Llama 3.2 and 4, with templates for it
    "mistral": MistralFormat,  # Mistral, Mixtral, Magistral
    "qwen-coder": QwenCoderFormat,  # Qwen3-Coder
    "glm": GlmFormat,  # GLM 4.5 and later
}
"""Name of a way to write calls -> the format of templates that have it. Beside these there is `none`."""

_TOOLS = re.compile(r"\btools\b")


def choose_tools(template: str, name: str) -> tuple[str, str]:
    """Return the name of the way in which a template's model writes calls, and the reason in a few words.

    Raises:
        PromptError: the name is unknown.
    """
    if name == "none" or name in TOOL_FORMATS:
        return name, "as set"
    if name != "auto":
        raise PromptError(
            f"there is no tool format {name!r}; there are auto, {', '.join(TOOL_FORMATS)}, none"
        )
    for known, found in (
        ("mistral", is_mistral),
        ("qwen-coder", is_qwen_coder),
        ("glm", is_glm),
        ("hermes", is_hermes),
        ("pythonic", is_pythonic),
        ("llama-json", is_llama_json),
    ):
        if found(template):
            return known, "the template's own"
    if _TOOLS.search(template):
        return "hermes", "described by the server, which cannot read calls as the template has them"
    return "hermes", "described by the server, because the template has no tools"


def tool_format_of(weights: Path, name: str) -> tuple[str, str]:
    """The same for a .gguf file or a checkpoint folder; `none` if it has no template.

    Raises:
        PromptError: the files are damaged, or the name is unknown.
    """
    template, _ = read_template(weights)
    chosen = choose_tools(template or "", name)
    return chosen if template is not None else ("none", "the model has no chat template")


def build(
    weights: Path, tokenizer: Tokenizer | None = None, *, tool_format: str = "auto"
) -> JinjaFormat | NoTemplate:
    """Read the template of a .gguf file or of a checkpoint folder.

    Raises:
        PromptError: the files are damaged, or the tool format is unknown.
    """
    template, tokens = read_template(weights)
    reasons = tokenizer is not None and {THINK, THOUGHT} <= tokenizer.control_tokens.keys()
    name, why = choose_tools(template or "", tool_format)
    if template is None:
        return NoTemplate()
    if name == "none":
        return JinjaFormat(template, tokens, reasons=reasons)
    return TOOL_FORMATS[name](template, tokens, reasons=reasons, described=why.startswith("described"))
