"""Turns a body of /v1/responses into the body of a chat, and keeps responses, so that later ones go on after them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from server.http.protocol.chat import ChatCompletionBody, ChatMessage
from server.http.protocol.errors import ApiError, bad_request
from server.http.protocol.responses import (
    CallItem,
    ContentPart,
    InputItem,
    MessageItem,
    NamedResponseTool,
    ReasoningItem,
    ResponseBody,
    ResponseObject,
    ResponseTool,
    ResultItem,
)
from server.http.protocol.structured import (
    ResponseFormat,
    ResponseTextFormat,
    TextSchemaFormat,
    schema_format,
)
from server.http.protocol.tools import (
    CalledFunction,
    FunctionTool,
    NamedFunction,
    NamedTool,
    PastCall,
    Tool,
)

MAX_KEPT_BYTES = 64 << 20
"""Text of all kept responses together, in bytes."""


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """A response that is kept.

    Attributes:
        key: the name of the key that made it. Other keys do not see it.
        response: the object.
        messages: the conversation, with the answer, without instructions.
        size: about how many bytes it takes.
    """

    key: str
    response: ResponseObject
    messages: Sequence[ChatMessage]
    size: int


class KeptResponses:
    """The newest responses, in memory: so many, and so many bytes. Older ones are forgotten."""

    def __init__(self, limit: int, *, max_bytes: int = MAX_KEPT_BYTES) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()

    def add(self, key: str, response: ResponseObject, messages: Sequence[ChatMessage]) -> None:
        """Keep a response, in place of one with the same id, and forget the oldest ones beyond the limits."""
        if (old := self._kept.pop(response.id, None)) is not None:
            self._bytes -= old.size
        size = 2048 + len(response.model_dump_json()) + sum(len(m.model_dump_json()) for m in messages)
        self._kept[response.id] = KeptResponse(key, response, messages, size)
        self._bytes += size
        while self._kept and (len(self._kept) > self._limit or self._bytes > self._max_bytes):
            self._bytes -= self._kept.popitem(last=False)[1].size

    def get(self, response_id: str, key: str) -> KeptResponse | None:
        """Return the response that a key made; None if there is none."""
        kept = self._kept.get(response_id)
        return kept if kept is not None and kept.key == key else None

    def find(self, response_id: str, key: str) -> KeptResponse:
        """The same as `get`.

        Raises:
            ApiError: 404, there is none.
        """
        kept = self.get(response_id, key)
        if kept is None:
            shown = response_id if response_id.isprintable() and len(response_id) <= 128 else ""
            raise ApiError(404, f"Response with id {shown!r} not found.", code="response_not_found")
        return kept

    def remove(self, response_id: str, key: str) -> None:
        """Forget a response.

        Raises:
            ApiError: 404, there is none.
        """
        self._bytes -= self.find(response_id, key).size
        del self._kept[response_id]


def conversation_of(body: ResponseBody, kept: KeptResponse | None) -> list[ChatMessage]:
    """Return the messages of a body, after those of the response that it goes on after."""
    messages = list(kept.messages) if kept is not None else []
    if isinstance(body.input, str):
        if not body.input and kept is None:
            raise bad_request("input is required", param="input", code="missing_field")
        return [*messages, _message("user", content=body.input)]
    messages += _messages(body.input)
    if not messages:
        raise bad_request("input must have at least one item", param="input")
    return messages


def chat_of_response(body: ResponseBody, messages: Sequence[ChatMessage]) -> ChatCompletionBody:
    """Return the chat that a body of /v1/responses means, given its conversation."""
    choice = body.tool_choice
    return ChatCompletionBody.model_construct(
        model=body.model,
        messages=[
            *([] if body.instructions is None else [_message("system", content=body.instructions)]),
            *messages,
        ],
        stream=body.stream,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        logprobs=body.wants_logprobs or None,
        top_logprobs=body.top_logprobs if body.wants_logprobs else None,
        tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=(
            NamedTool(type="function", function=NamedFunction(name=choice.name))
            if isinstance(choice, NamedResponseTool)
            else choice
        ),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=None if body.text is None else _format(body.text.format),
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        return_token_ids=body.enable_response_messages,
        dsa=body.dsa,
    )


def _format(wanted: ResponseTextFormat | None) -> ResponseFormat | None:
    if isinstance(wanted, TextSchemaFormat):
        return schema_format(wanted.json_schema, wanted.name)
    return wanted


def answer_of(output: Sequence[dict[str, Any]]) -> list[ChatMessage]:
    """Return the messages of a chat that the items of an answer are."""
    kinds: dict[str, type[MessageItem | CallItem | ReasoningItem]] = {
        "message": MessageItem,
        "function_call": CallItem,
        "reasoning": ReasoningItem,
    }
    return _messages([kinds[item["type"]].model_validate(item) for item in output])


def _messages(items: Sequence[InputItem]) -> list[ChatMessage]:
    """Join the items of one turn of the assistant, which a chat has in one message."""
    out: list[ChatMessage] = []
    turn: dict[str, Any] = {}

    def flush() -> None:
        if turn:
            out.append(_message("assistant", **({"content": ""} | turn)))
            turn.clear()

    for item in items:
        match item:
            case ReasoningItem():
                if "content" in turn or "tool_calls" in turn:
                    flush()
                thought = _text(item.content or item.summary or [])
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
            case CallItem():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = PastCall(id=item.call_id, type="function", function=function)
                turn["tool_calls"] = [*turn.get("tool_calls", []), call]
            case MessageItem(role="assistant"):
                if "content" in turn or "tool_calls" in turn:
                    flush()
                turn["content"] = _text(item.content)
            case ResultItem():
                flush()
                out.append(_message("tool", content=_text(item.output), tool_call_id=item.call_id))
            case MessageItem():
                flush()
                out.append(_message(item.role, content=_text(item.content)))
    flush()
    return out


def _message(role: str, **fields: Any) -> ChatMessage:
    return ChatMessage.model_construct(role=role, **fields)


def _text(content: str | Sequence[ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _tool(tool: ResponseTool) -> Tool:
    fields = {name: getattr(tool, name) for name in FunctionTool.model_fields}
    return Tool(type="function", function=FunctionTool.model_construct(**fields))
