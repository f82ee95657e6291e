"""Templates that cannot write tools, calls, results or a system message; and the choice of a tool format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.chat import PromptError, choose_tool_format, encode_chat, load_chat_format
from server.chat.hermes import HermesFormat
from server.chat.jinja import JinjaFormat
from server.chat.template import TOOL_FORMATS, choose_tools
from tests.server.chat.kit import VOCABULARY, assistant, codes, read, tool, user, written
from tests.server.chat.templates import GEMMA, HERMES, LLAMA, MISTRAL, MISTRAL_LIST, PLAIN, PYTHONIC

TEMPLATES = {
    "hermes": HERMES,
    "llama-json": LLAMA,
    "pythonic": PYTHONIC,
    "mistral": MISTRAL,
    "mistral-list": MISTRAL_LIST,
    "plain": PLAIN,
    "gemma": GEMMA,
}
WEATHER = tool("weather", city="string")
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    user("Rio and Oslo?"),
    assistant("Wait.", None, ("weather", {"city": "Rio"}), ("weather", {"city": "Oslo"})),
    {"role": "tool", "tool_call_id": "c0", "content": "sunny"},
    {"role": "tool", "tool_call_id": "c1", "content": "snow"},
    assistant("Sunny and snow."),
    user("Thanks."),
]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (HERMES, "hermes"), (LLAMA, "llama-json"), (PYTHONIC, "pythonic"), (MISTRAL, "mistral"),
        (MISTRAL_LIST, "mistral"), (PLAIN, "hermes"), (GEMMA, "hermes"), ("{{ tools }}<function=name>", "hermes"),
    ],
)  # fmt: skip
def test_the_format_is_found_in_the_template(template: str, name: str) -> None:
    found, why = choose_tools(template, "auto")
    assert found == name
    assert why.startswith("described") == (template not in (HERMES, LLAMA, PYTHONIC, MISTRAL, MISTRAL_LIST))
    assert choose_tools(template, "pythonic") == ("pythonic", "as set")
    assert choose_tools(template, "none") == ("none", "as set")
    with pytest.raises(PromptError, match="there are auto, hermes, .*, none"):
        choose_tools(template, "other")


@pytest.mark.parametrize("form", TOOL_FORMATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_writes_the_whole_conversation(name: str, form: str) -> None:
    """Whatever the template is, and whatever the format is set to."""
    chat = TOOL_FORMATS[form](TEMPLATES[name])
    text = chat.render(chat.decode(TALK), tools=[WEATHER])
    for word in ("Be brief.", "weather", "Does weather.", '"city"', "Oslo", "sunny", "snow", "Thanks."):
        assert word in text, word
    before = [text.index(word) for word in ("Be brief.", "Rio and Oslo?", "sunny", "snow", "Thanks.")]
    assert before == sorted(before)
    found = encode_chat(chat, VOCABULARY, TALK, tools=[WEATHER])
    assert VOCABULARY.decode(found) == text


@pytest.mark.parametrize("template", [PLAIN, GEMMA])
@pytest.mark.parametrize("form", TOOL_FORMATS)
def test_calls_in_words_are_as_the_model_is_told_to_write_them(form: str, template: str) -> None:
    chat = TOOL_FORMATS[form](template)
    assert chat.described
    calls = [
        {"name": "weather", "arguments": {"city": "Rio"}},
        {"name": "weather", "arguments": {"city": "Oslo"}},
    ]
    found = read(chat.parser(tools=["weather"]), chat.written_calls(calls))
    assert written(found) == [("weather", {"city": "Rio"}), ("weather", {"city": "Oslo"})]
    assert not codes(found)
    assert "system" not in chat.render([user("hi")], tools=()).lower()  # without tools nothing is added


def test_a_template_whose_calls_are_not_known_does_not_get_the_tools() -> None:
    template = "{{ tools }}" + PLAIN
    assert "'weather'" in HermesFormat(template).render([user("hi")], tools=[WEATHER])
    text = HermesFormat(template, described=True).render([user("hi")], tools=[WEATHER])
    assert text.startswith("None[system]You can call these functions:")


def test_a_template_that_wants_arguments_as_text_gets_them() -> None:
    template = (
        "{{ tools }}{% for m in messages %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    chat = HermesFormat(template)
    assert 'weather {"city": "Rio"}' in chat.render(chat.decode(TALK))


def folder(path: Path, template: str, **config: Any) -> Path:
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


def test_the_setting_overrides_what_is_found(tmp_path: Path) -> None:
    weights = folder(tmp_path, LLAMA)
    assert choose_tool_format(weights, "jinja") == ("llama-json", "the template's own")
    assert isinstance(load_chat_format(weights), TOOL_FORMATS["llama-json"])
    assert isinstance(load_chat_format(weights, tool_format="mistral"), TOOL_FORMATS["mistral"])
    plain = load_chat_format(weights, tool_format="none")
    assert type(plain) is JinjaFormat
    assert not plain.tools
    with pytest.raises(
        PromptError, match=r"deepseek-v3\.2 has its own form of calls; leave --tool-format out"
    ):
        load_chat_format(weights, "deepseek-v3.2", tool_format="hermes")
    with pytest.raises(PromptError, match="no tool format 'x'"):
        load_chat_format(weights, tool_format="x")


def test_a_checkpoint_without_a_template_has_no_calls(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert choose_tool_format(tmp_path, "jinja") == ("none", "the model has no chat template")
    assert not load_chat_format(tmp_path).tools
