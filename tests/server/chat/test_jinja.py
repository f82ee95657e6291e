"""The checkpoint's own template, against transformers on the default model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from server.chat import ChatFormat, PromptError, encode_chat, load_chat_format
from server.chat.jinja import JinjaFormat, NoTemplate
from server.chat.template import build
from server.text.gguf import read_metadata
from server.text.tokenizer import Tokenizer

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Answer in French."}, {"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "user", "content": "Write a loop.\n\n"},
        {"role": "assistant", "content": "for i in range(10):\n    print(i < 5, '<b>')"},
        {"role": "user", "content": "  Now in C++: vector<int> \t"},
    ],
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\n"},
    ],
    [
        {
            "role": "user",
            "content": "émoji 👩\u200d👩\u200d👧 中文 \u0301 {{ messages }} {% if %} 'quotes' \"double\"",
        }
    ],
]


@pytest.fixture(scope="module")
def chat_format(default_model: Path) -> ChatFormat:
    return load_chat_format(default_model)


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_prompts_equal_those_of_transformers(
    default_model: Path,
    tokenizer: Tokenizer,
    chat_format: ChatFormat,
    messages: list[dict[str, Any]],
    generate: bool,
) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer._backend)
    reference.chat_template = read_metadata(default_model)["tokenizer.chat_template"]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    ids = reference.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False)
    assert chat_format.render(messages, add_generation_prompt=generate) == text
    assert encode_chat(chat_format, tokenizer, messages, generate) == list(ids)


def test_blocks_are_trimmed_and_helpers_are_there() -> None:
    template = """
    {%- for message in messages %}
        {%- if message.role == 'skip' %}{% continue %}{% endif %}
        {% if loop.first %}
{{ message | tojson }}
        {% endif %}
    {%- endfor %}
{{ bos_token }}{{ strftime_now('%Y') | length }}"""
    text = JinjaFormat(template, {"bos_token": "<s>"}).render([{"role": "user", "content": "a<b>'é"}])
    assert text == '{"role": "user", "content": "a<b>\'é"}\n<s>4'


def test_marks_of_training_leave_their_body() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<eos>{% endgeneration %}"
        "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    messages = [{"role": role, "content": "hi"} for role in ("user", "assistant", "user")]
    assert JinjaFormat(template).render(messages) == "user: hi\nhi<eos>user: hi\n"


def test_text_parts_are_joined() -> None:
    chat_format = JinjaFormat("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat_format.render([{"role": "user", "content": parts}]) == "one\ntwo"
    with pytest.raises(PromptError, match="type 'text'"):
        chat_format.render([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", [{"role": "user"}], "roles must alternate"),
        (
            "{{ 'a' + messages[0].content }}",
            [{"role": "user", "content": None}],
            "cannot write these messages",
        ),
        (
            "{{ messages[0].content.nothing.more }}",
            [{"role": "user", "content": "x"}],
            "cannot write these messages",
        ),
        ("{{ messages[0].__class__.__mro__ }}", [{"role": "user", "content": "x"}], "unsafe"),
        ("{{ messages.append(1) }}", [{"role": "user", "content": "x"}], "unsafe"),
        ("x", [], "at least one message"),
    ],
)
def test_what_a_template_cannot_do_is_a_sentence(template: str, messages: list[Any], sentence: str) -> None:
    with pytest.raises(PromptError, match=sentence):
        JinjaFormat(template).render(messages)


def test_a_damaged_template_is_found_at_start() -> None:
    with pytest.raises(PromptError, match="not valid"):
        JinjaFormat("{% for %}")


def test_content_is_never_run_as_a_template() -> None:
    chat_format = JinjaFormat("{{ messages[0].content }}")
    assert chat_format.render([{"role": "user", "content": "{{ 7 * 7 }}"}]) == "{{ 7 * 7 }}"


def test_templates_of_folders(tmp_path: Path) -> None:
    assert isinstance(build(tmp_path), NoTemplate)
    with pytest.raises(PromptError, match="no chat template"):
        build(tmp_path).render([{"role": "user", "content": "x"}])
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "default{{ eos_token }}"},
    ]
    config = {"chat_template": named, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert build(tmp_path).render([{"role": "user", "content": "x"}]) == "default</s>"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert build(tmp_path).render([{"role": "user", "content": "x"}]) == "own file"
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(PromptError, match="JSON object"):
        build(tmp_path)


def test_an_unknown_format_is_refused(default_model: Path) -> None:
    with pytest.raises(PromptError, match="no chat format 'morse'"):
        load_chat_format(default_model, "morse")


def test_whether_a_template_writes_names() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert not JinjaFormat(plain).names
    assert JinjaFormat(plain.replace("m.role", "m.name or m.role")).names
    assert not JinjaFormat("{{ raise_exception('no') }}").names
