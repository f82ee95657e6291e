"""A checkpoint's own template in conversations with tools: what it cannot write is written for it.

What a template can do is found by trying it. A template that does not write tools gets their description in the system
message, calls as text of the assistant, and results as text of the user. One that writes a single call a message gets
one message a call. One that has no system message gets it at the begin of the user's first message.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from server.chat.errors import PromptError
from server.chat.jinja import JinjaFormat
from server.chat.parsing import json_object_problem

RESULT, RESULT_END = "<tool_response>", "</tool_response>"

WrittenMessage = Mapping[str, Any]

_ID_LETTERS = 9
_NEEDLE = "needle"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": _NEEDLE,
        "description": "Sews.",
        "parameters": {"type": "object", "properties": {"thread": {"type": "string"}}},
    },
}


def _call(number: int, arguments: Any, identity: str = "abcdefgh") -> dict[str, Any]:
    return {
        "id": f"{identity}{number}",
        "type": "function",
        "function": {"name": _NEEDLE, "arguments": arguments},
    }


def _talk(arguments: Any, count: int = 1, *, identity: str = "abcdefgh") -> list[dict[str, Any]]:
    calls = [_call(number, arguments, identity) for number in range(count)]
    results = [
        {"role": "tool", "name": _NEEDLE, "tool_call_id": call["id"], "content": "stitch"} for call in calls
    ]
    return [
        {"role": "user", "content": "sew"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        *results,
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "more"},
    ]


class ToolTemplate(JinjaFormat):
    """A checkpoint's template, and a way to write calls and to read them.

    Args:
        template: the template's source.
        tokens: name in templates -> text of the control token.
        reasons: the vocabulary has <think> and </think>.
        described: the template does not get the tools, whatever it can do.

    Attributes:
        described: the description of tools is put into the system message.
    """

    tools = True

    def __init__(
        self,
        template: str,
        tokens: Mapping[str, str] | None = None,
        *,
        reasons: bool = False,
        described: bool = False,
    ) -> None:
        super().__init__(template, tokens, reasons=reasons)
        self.thinking_with_tools = self.thinking
        hello = [{"role": "user", "content": "sew"}]
        system = [{"role": "system", "content": "cloth"}, *hello]
        self._no_system = self._writes(hello, "sew") and not self._writes(system, "cloth")
        self.described = described or not self._writes(hello, _NEEDLE, tools=[_TOOL])
        objects, texts = {"thread": "x"}, '{"thread": "x"}'
        self._as_text = not self._writes(_talk(objects), _NEEDLE) and self._writes(_talk(texts), _NEEDLE)
        arguments: Any = texts if self._as_text else objects
        self._plain_calls = self.described or not all(
            self._writes(_talk(arguments), word) for word in (_NEEDLE, "stitch")
        )
        self._short_ids = not self._plain_calls and not self._writes(
            _talk(arguments, identity="call_of_a_tool"), _NEEDLE
        )
        self._one_by_one = not self._plain_calls and not self._writes(_talk(arguments, 2), _NEEDLE)

    @abstractmethod
    def described_tools(self, tools: Sequence[WrittenMessage]) -> str:
        """The text that describes the tools, and how to call them."""

    @abstractmethod
    def written_calls(self, calls: Sequence[WrittenMessage]) -> str:
        """Calls as the model writes them; each has `name` and `arguments`, which is an object."""

    def decode(self, messages: Sequence[WrittenMessage]) -> Sequence[WrittenMessage]:
        """Replace the JSON text of each call's arguments by its object, because templates write it as JSON.

        Raises:
            PromptError: the arguments of a call are not a JSON object.
        """
        decoded = [_decoded(index, message) for index, message in enumerate(messages)]
        return [_renamed(message) for message in decoded] if self._short_ids else decoded

    def plain_markers(self, role: str) -> tuple[str, ...]:
        """The tags that a rewritten conversation has."""
        return (RESULT, RESULT_END) if self._plain_calls else ()

    def render(
        self,
        messages: Sequence[WrittenMessage],
        *,
        tools: Sequence[WrittenMessage] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the prompt's text.

        Raises:
            PromptError: the template refuses these messages or does not know what to do with them.
        """
        if self._plain_calls:
            messages = _joined(self._in_words(messages))
        elif self._one_by_one:
            messages = list(_one_by_one(messages))
        if self.described and tools:
            messages = _with_system(messages, self.described_tools(tools))
        if self._no_system:
            messages = _without_system(messages)
        if self._as_text:
            messages = [_with_calls(message, _argument_text) for message in messages]
        return super().render(
            messages,
            tools=() if self.described else tools,
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
        )

    def _writes(
        self, messages: Sequence[WrittenMessage], word: str, tools: Sequence[WrittenMessage] = ()
    ) -> bool:
        """Whether the template writes a word of this conversation."""
        try:
            return word in super().render(messages, tools=tools, add_generation_prompt=False)
        except PromptError:
            return False

    def _in_words(self, messages: Sequence[WrittenMessage]) -> Iterator[WrittenMessage]:
        """The messages, with calls as text of the assistant and results as text of the user."""
        for message in messages:
            match message:
                case {"role": "tool"}:
                    yield {"role": "user", "content": f"{RESULT}\n{message['content']}\n{RESULT_END}"}
                case {"tool_calls": calls} if calls:
                    written = self.written_calls([call["function"] for call in calls])
                    content = "\n".join(part for part in (message.get("content"), written) if part)
                    kept = {key: value for key, value in message.items() if key != "tool_calls"}
                    yield kept | {"content": content}
                case _:
                    yield message


def _joined(messages: Iterable[WrittenMessage]) -> list[WrittenMessage]:
    """Join neighbouring messages of the user, because templates want turns."""
    out: list[WrittenMessage] = []
    for message in messages:
        if out and message["role"] == "user" == out[-1]["role"]:
            out[-1] = {**message, "content": f"{out[-1]['content']}\n{message['content']}"}
        else:
            out.append(message)
    return out


def _one_by_one(messages: Sequence[WrittenMessage]) -> Iterator[WrittenMessage]:
    """Give each call a message of its own, with its result after it. Results are in the order of the calls."""
    waiting: list[WrittenMessage] = []
    for message in messages:
        if message["role"] == "tool" and waiting:
            yield waiting.pop(0)
            yield message
            continue
        calls = message.get("tool_calls") or ()
        if len(calls) < 2:
            yield message
        else:
            waiting = [
                {**message, "content": message["content"] if not number else "", "tool_calls": [call]}
                for number, call in enumerate(calls)
            ]


def _with_system(messages: Sequence[WrittenMessage], text: str) -> list[WrittenMessage]:
    first, *rest = messages
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [{**first, "content": f"{first['content']}\n\n{text}".lstrip("\n")}, *rest]


def _without_system(messages: Sequence[WrittenMessage]) -> list[WrittenMessage]:
    """Put what the system messages say before what the user says next."""
    out: list[WrittenMessage] = []
    said: list[str] = []
    for message in messages:
        if message["role"] == "system":
            said.append(str(message["content"]))
        elif message["role"] == "user" and said:
            out.append({**message, "content": "\n\n".join([*said, str(message["content"])])})
            said = []
        else:
            out.append(message)
    return [*out, {"role": "user", "content": "\n\n".join(said)}] if said else out


def _renamed(message: WrittenMessage) -> WrittenMessage:
    """The message with ids of nine letters and digits: the same new one for the same old one."""
    changed = dict(message)
    if message.get("tool_call_id"):
        changed["tool_call_id"] = _short(message["tool_call_id"])
    if message.get("tool_calls"):
        changed["tool_calls"] = [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]
    return changed


def _short(identity: str) -> str:
    if len(identity) == _ID_LETTERS and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.blake2b(identity.encode(errors="replace")).hexdigest()[:_ID_LETTERS]


def _with_calls(message: WrittenMessage, change: Callable[[Any], Any]) -> WrittenMessage:
    calls = message.get("tool_calls")
    if not calls:
        return message
    changed = [
        {**call, "function": {**call["function"], "arguments": change(call["function"]["arguments"])}}
        for call in calls
    ]
    return {**message, "tool_calls": changed}


def _argument_text(arguments: Any) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _decoded(index: int, message: WrittenMessage) -> WrittenMessage:
    for number, call in enumerate(message.get("tool_calls") or ()):
        if json_object_problem(call["function"]["arguments"]):
            raise PromptError(
                f"messages[{index}].tool_calls[{number}].function.arguments must be a JSON object with each key "
                "once, because this model's format writes it as JSON"
            )
    return _with_calls(message, json.loads)
