"""Turns a body of /v1/messages into the body of a chat, so that both are one thing from there on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.http.protocol.chat import ChatCompletionBody, ChatMessage, ThinkingOptions
from server.http.protocol.errors import bad_request
from server.http.protocol.messages import (
    Block,
    ClientTool,
    CountTokensBody,
    InputMessage,
    MessagesBody,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    ToolUseChoice,
)
from server.http.protocol.structured import SchemaFormat, schema_format
from server.http.protocol.tools import (
    CalledFunction,
    FunctionTool,
    NamedFunction,
    NamedTool,
    PastCall,
    Tool,
    ToolChoice,
)


def chat_of(body: CountTokensBody) -> ChatCompletionBody:
    """Return the chat that a body of /v1/messages means.

    A last message of the assistant is continued by the answer.

    Raises:
        ApiError: a block is at a place where it means nothing.
    """
    messages = [] if body.system is None else [_message("system", content=_text(body.system))]
    waiting: list[str] = []
    for index, message in enumerate(body.messages):
        waiting = _add(messages, message, f"messages[{index}]", waiting)
    if waiting:
        raise bad_request(f"the call {waiting[0]!r} has no tool_result; send one", param="messages")
    choice = body.tool_choice
    prefilled = body.messages[-1].role == "assistant"
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "tools": [_tool(tool) for tool in body.tools or ()] or None,
        "tool_choice": None if choice is None else _choice(choice),
        "parallel_tool_calls": False if choice is not None and choice.disable_parallel_tool_use else None,
        "continue_final_message": prefilled or None,
    }
    if body.thinking is not None and body.thinking.type != "adaptive":
        fields["thinking"] = ThinkingOptions(
            type=body.thinking.type,
            budget_tokens=body.thinking.budget_tokens if body.thinking.type == "enabled" else None,
        )
    if isinstance(body, MessagesBody):
        fields |= {
            "max_tokens": body.max_tokens,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
            "response_format": _format(body),
            "dsa": body.dsa,
        }
    return ChatCompletionBody.model_construct(**fields)


def _format(body: MessagesBody) -> SchemaFormat | None:
    configured = body.output_config.format if body.output_config is not None else None
    if configured is not None and body.output_format is not None:
        raise bad_request(
            "output_format and output_config.format are two names of one thing; send one",
            param="output_format",
        )
    wanted = configured or body.output_format
    return None if wanted is None else schema_format(wanted.json_schema)


def _add(out: list[ChatMessage], message: InputMessage, path: str, waiting: list[str]) -> list[str]:
    """Append what a message is in a chat. `waiting` are the calls that need results; return those after it."""
    blocks: Sequence[Block] = (
        [TextBlock(type="text", text=message.content)]
        if isinstance(message.content, str)
        else message.content
    )
    allowed = {"assistant": (TextBlock, ThinkingBlock, ToolUseBlock), "user": (TextBlock, ToolResultBlock)}
    for number, block in enumerate(blocks):
        if not isinstance(block, allowed.get(message.role, (TextBlock,))):
            raise bad_request(
                f"{path}.content[{number}] is of type {block.type!r}, which a message of role {message.role!r} cannot "
                "have",
                param=f"{path}.content",
            )
    waiting = list(waiting)
    for number, block in enumerate(blocks):
        if isinstance(block, ToolResultBlock):
            if block.tool_use_id not in waiting:
                raise bad_request(
                    f"{path}.content[{number}].tool_use_id is not the id of a call that waits for its result",
                    param=f"{path}.content",
                )
            waiting.remove(block.tool_use_id)
            said = _text(block.content or "")
            out.append(
                _message(
                    "tool",
                    content=f"Error: {said}" if block.is_error else said,
                    tool_call_id=block.tool_use_id,
                )
            )
    if waiting:
        raise bad_request(
            f"{path} must begin with a tool_result for the call {waiting[0]!r}", param=f"{path}.content"
        )
    text = _text([block for block in blocks if isinstance(block, TextBlock)])
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if message.role == "assistant":
        fields: dict[str, Any] = {"content": text}
        if thought := "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock)):
            fields["reasoning_content"] = thought
        if calls:
            fields["tool_calls"] = [_call(block) for block in calls]
        out.append(_message("assistant", **fields))
    elif text or not any(isinstance(block, ToolResultBlock) for block in blocks):
        out.append(_message(message.role, content=text))
    return [block.id for block in calls]


def _message(role: str, **fields: Any) -> ChatMessage:
    return ChatMessage.model_construct(role=role, **fields)


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _call(block: ToolUseBlock) -> PastCall:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return PastCall(
        id=block.id, type="function", function=CalledFunction(name=block.name, arguments=arguments)
    )


def _tool(tool: ClientTool) -> Tool:
    function = FunctionTool(
        name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
    )
    return Tool(type="function", function=function)


def _choice(choice: ToolUseChoice) -> ToolChoice:
    if choice.type != "tool":
        return "required" if choice.type == "any" else choice.type
    if choice.name is None:
        raise bad_request("tool_choice of type 'tool' needs the name of the tool", param="tool_choice.name")
    return NamedTool(type="function", function=NamedFunction(name=choice.name))
