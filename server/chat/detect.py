"""Decides from a checkpoint's files which chat format it needs."""

from __future__ import annotations

from pathlib import Path

from server.chat.errors import PromptError
from server.text.loading import read_json
from server.text.tokenizer import TokenizerError

_OLD_CALL = "```json"  # V3 and R1 write arguments into a fenced block


def model_type(weights: Path) -> str:
    """`model_type` in a folder's config.json; "" for a .gguf file or if it is missing.

    Raises:
        PromptError: the file is damaged.
    """
    if weights.is_file():
        return ""
    try:
        return str(read_json(weights / "config.json").get("model_type", ""))
    except TokenizerError as error:
        raise PromptError(str(error)) from error


def detect(weights: Path) -> tuple[str, str]:
    """Return the name of a format, and the reason in a few words.

    V3.2 has no chat template; V3.2-Exp has one. The templates of V3.1 and of V3 write calls in different ways.

    Raises:
        PromptError: the files are damaged.
    """
    kind = model_type(weights)
    if kind in ("deepseek_v3", "deepseek_v32"):
        from server.chat.jinja import read_template

        template, _ = read_template(weights)
        if template is None and kind == "deepseek_v32":
            return "deepseek-v3.2", "a deepseek_v32 without a chat template"
        if (
            template is not None
            and "</think>" in template
            and "thinking" in template
            and _OLD_CALL not in template
        ):
            return "deepseek-v3.1", f"a {kind} whose chat template has a switch for thinking"
    return "jinja", "the checkpoint's own chat template"
