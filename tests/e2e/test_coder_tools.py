"""An agent's tool calls from Qwen2.5-Coder-1.5B: 20 fixed cases, streamed to OpenAI's client.

The model itself, run by transformers on the same file and the same prompts, says in which cases there is a call to make.
The file has 1.1 GB and both models answer on the CPU, so this runs only if DSA_TEST_CODER=1 asks for it: ten minutes.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jsonschema
import pytest
import torch
from transformers import AutoModelForCausalLM

from server.chat import encode_chat, load_chat_format
from server.hub.catalogue import CODER_MODEL, MODELS
from server.hub.models import model_file
from server.text.loading import load_tokenizer
from tests.e2e.serving import Server

FILE = model_file(CODER_MODEL)
PRESENT = FILE.is_file() and FILE.stat().st_size == MODELS[CODER_MODEL].source.size
ASKED = os.environ.get("DSA_TEST_CODER") == "1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.process,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not ASKED, reason="takes ten minutes: DSA_TEST_CODER=1 asks for it"),
    pytest.mark.skipif(
        not PRESENT, reason=f"{FILE} is not there: `dsa pull {CODER_MODEL}` fetches it (1.1 GB)"
    ),
]

MOST_TOKENS = 96
TYPES = {"string": str, "integer": int}


def function(
    name: str, description: str, required: tuple[str, ...], **parameters: dict[str, Any]
) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(required)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


TOOLS: list[Any] = [
    function(
        "get_weather", "Get the weather of a city.", ("city",),
        city={"type": "string", "description": "The city's name"},
        unit={"type": "string", "enum": ["celsius", "fahrenheit"]},
    ),
    function(
        "search_files", "Search the project's files for a pattern.", ("pattern",),
        pattern={"type": "string", "description": "Text or regular expression"},
        folder={"type": "string", "description": "Where to search"},
        limit={"type": "integer", "description": "The most matches"},
    ),
]  # fmt: skip
QUESTIONS = (
    "What is the weather in Paris?",
    "How warm is it in Oslo right now, in celsius?",
    "Give me the weather in New York in fahrenheit.",
    "Is it raining in Kyoto?",
    "Do I need an umbrella in London today?",
    "Weather for São Paulo, please.",
    "What's the temperature in Zürich?",
    "Check the weather in Cairo in celsius.",
    "I am flying to Reykjavik. How is the weather there?",
    "Tell me the current weather of Buenos Aires.",
    "Where in the project is TODO mentioned?",
    "Find all uses of read_config in the folder src.",
    "Search for the text 'import numpy' in the files.",
    "Which files contain the word deprecated? Show at most 5.",
    'Look for "timeout = 30" in the folder deploy.',
    "Find the definition of class Scheduler in the project.",
    "Search the folder tests for pytest.mark.slow.",
    "Show me up to 10 places where logging.debug is called.",
    "Are there any files with FIXME in docs?",
    "Search for the pattern ^def main in the project.",
)


class Call(NamedTuple):
    """A tool call as it came to the client."""

    name: str
    arguments: str
    finish_reason: str


def strict(tool: dict[str, Any]) -> dict[str, Any]:
    schema = {**tool["function"]["parameters"], "additionalProperties": False}
    return {"type": "function", "function": {**tool["function"], "parameters": schema, "strict": True}}


def streamed(
    server: Server, question: str, tools: Sequence[Any] = TOOLS, tool_choice: Any = "auto"
) -> list[Call]:
    """Ask over the stream; join the pieces as OpenAI's clients do."""
    parts: dict[int, list[str]] = {}
    reason = ""
    with server.sdk() as sdk:
        stream = sdk.chat.completions.create(
            model=CODER_MODEL, messages=[{"role": "user", "content": question}], tools=list(tools), temperature=0,
            tool_choice=tool_choice, max_tokens=MOST_TOKENS, stream=True,
        )  # fmt: skip
        for chunk in stream:
            for choice in chunk.choices:
                reason = choice.finish_reason or reason
                for piece in choice.delta.tool_calls or ():
                    assert piece.function is not None
                    if piece.index not in parts:
                        assert piece.id
                        assert piece.function.name
                        parts[piece.index] = [piece.function.name, ""]
                    parts[piece.index][1] += piece.function.arguments or ""
    return [Call(name, arguments, reason) for _, (name, arguments) in sorted(parts.items())]


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that are in a text, whatever stands around them."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            end = at + 1
        else:
            yield found
        at = text.find("{", end)


def made_by_transformers() -> list[str | None]:
    """The first function that the model itself calls in each case, greedily; None if it calls none."""
    chat, text = load_chat_format(FILE), load_tokenizer(FILE)
    prompts = [encode_chat(chat, text, [{"role": "user", "content": q}], tools=TOOLS) for q in QUESTIONS]  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        str(FILE.parent), gguf_file=FILE.name, dtype=torch.float32, local_files_only=True
    ).eval()  # in bfloat16 most CPUs take ten times as long
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    names = {tool["function"]["name"] for tool in TOOLS}
    found: list[str | None] = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_TOKENS, do_sample=False,
            eos_token_id=list(text.eos_token_ids), pad_token_id=0,
        )  # fmt: skip
        said = objects(text.decode(out[0, len(prompt) :].tolist()))
        calls = [one["name"] for one in said if one.get("name") in names and "arguments" in one]
        found.append(calls[0] if calls else None)
    torch.set_num_threads(threads)
    del model
    gc.collect()
    return found


def test_the_calls_that_the_model_makes_come_well_formed() -> None:
    server = Server(CODER_MODEL)
    try:
        server.wait_ready()
        answers = [streamed(server, question) for question in QUESTIONS]
    finally:
        server.close()
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    made = made_by_transformers()
    assert sum(name is not None for name in made) >= 10, made  # else the cases show nothing
    broken = []
    for question, name, calls in zip(QUESTIONS, made, answers, strict=True):
        if name is None:
            continue
        try:
            assert calls, "no call"
            for call in calls:
                assert call.finish_reason == "tool_calls"
                arguments = json.loads(call.arguments)
                schema = schemas[call.name]
                assert set(schema["required"]) <= arguments.keys() <= schema["properties"].keys()
                for key, value in arguments.items():
                    assert isinstance(value, TYPES[schema["properties"][key]["type"]])
            assert calls[0].name == name
        except (AssertionError, ValueError, KeyError) as problem:
            broken.append((question, calls, repr(problem)))
    assert not broken


@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_arguments_of_strict_tools_are_valid(tool_choice: str) -> None:
    tools = [strict(tool) for tool in TOOLS]
    server = Server(CODER_MODEL)
    try:
        server.wait_ready()
        answers = [streamed(server, question, tools, tool_choice) for question in QUESTIONS]
    finally:
        server.close()
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    finished = 0
    for question, calls in zip(QUESTIONS, answers, strict=True):
        assert calls or tool_choice == "auto", question
        for call in calls:
            if call.finish_reason == "tool_calls":  # else the limit of tokens cut it
                jsonschema.Draft202012Validator(schemas[call.name]).validate(json.loads(call.arguments))
                finished += 1
    assert finished >= (18 if tool_choice == "required" else 10), answers
