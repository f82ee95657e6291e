"""Checks the messages and switches of a chat body, so that a prompt format may rely on them.

After the check every call has exactly one result, and the results are in the order of the calls. Only messages of
the assistant have calls and reasoning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.chat import ChatFormat
from server.chat.grammar import ToolForm
from server.http.protocol.chat import ROLES, ChatCompletionBody, ChatMessage
from server.http.protocol.errors import bad_request
from server.http.protocol.notices import Notice
from server.http.protocol.tools import NamedTool, PastCall

KWARGS = "chat_template_kwargs"
_SWITCHES = ("thinking", "enable_thinking")
NO_TOOLS = "this model's chat format has no tool calling; leave it out and describe the tools in a message"
MAX_NOTICES = 20
_ROLES = {"developer": "system"}
"""OpenAI's newer role names, mapped to the older ones that prompt formats know."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the prompt contains, and how to read the answer.

    Attributes:
        messages: OpenAI's messages, with content that is text.
        tools: the tools that the prompt describes.
        thinking: whether the model reasons; None is the format's default.
        budget: the limit of reasoning, in tokens; None is no limit.
        callable: the tools that may be called, by name, each with the schema of its arguments; None if no tool may be
            called.
        must_call: the answer has to call a tool.
        named: the tool that the answer has to call, if one is named.
        single: the answer ends with its first call.
        forms: what the arguments of the callable tools must be.
        variables: what else of the prompt's format is set.
        notices: what of the body has no effect.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]]
    thinking: bool | None
    budget: int | None
    callable: Mapping[str, Mapping[str, Any]] | None
    must_call: bool
    named: str | None
    single: bool
    forms: tuple[ToolForm, ...]
    variables: Mapping[str, Any]
    notices: tuple[Notice, ...] = ()


def read_conversation(body: ChatCompletionBody, chat: ChatFormat) -> Conversation:
    """Check a body against what the model's chat format can express.

    Raises:
        ApiError: the format cannot express the body; the message says what to change.
    """
    if body.echo and not body.continue_final_message:
        raise bad_request(
            "echo gives back the text that an answer continues, so it needs continue_final_message to be true",
            param="echo",
        )
    lost: list[Notice] = []
    thinking, budget = _thinking(body, chat, lost)
    variables = _variables(body.chat_template_kwargs or {}, chat, lost)
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    must_call = named is not None or choice == "required"
    if body.tools and not chat.tools:
        raise bad_request(f"tools must be empty: {NO_TOOLS}", param="tools")
    if must_call and not chat.tools:
        raise bad_request(f"tool_choice must be 'none', 'auto' or null: {NO_TOOLS}", param="tool_choice")
    functions = [tool.function for tool in body.tools or ()]
    names = frozenset(function.name for function in functions)
    if len(names) < len(functions):
        raise bad_request("tools must have a name each of their own", param="tools")
    if must_call and not functions:
        raise bad_request("tool_choice asks for a call, but there are no tools to call", param="tool_choice")
    if named is not None and named not in names:
        raise bad_request(
            f"tool_choice names {named!r}, which is not among the tools", param="tool_choice.function.name"
        )
    if functions and thinking and not chat.thinking_with_tools:
        raise bad_request(
            "this model's chat format calls tools without thinking only; switch thinking off, or leave the tools "
            "out",
            param="tools",
        )
    if choice == "none":
        functions = []
    if must_call and len(functions) == 1:
        named = functions[0].name
    tools = [
        {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": function.parameters or {"type": "object", "properties": {}},
            },
        }
        for function in functions
    ]
    return Conversation(
        messages=_messages(body.messages, chat),
        tools=tools,
        thinking=thinking,
        budget=budget,
        callable={function.name: function.parameters or {} for function in functions} or None,
        must_call=must_call,
        named=named,
        single=body.parallel_tool_calls is False,
        forms=tuple(
            ToolForm(
                function.name,
                function.parameters or {"type": "object", "properties": {}, "additionalProperties": False},
                strict=bool(function.strict),
            )
            for function in functions
        ),
        variables=variables,
        notices=(
            *lost,
            *(() if chat.names else itertools.islice(_unwritten(body.messages), MAX_NOTICES)),
            *(() if chat.reasons else itertools.islice(_thoughts(body.messages), MAX_NOTICES)),
        ),
    )


def refuse_lost_variables(said: Conversation) -> None:
    """Refuse what a body sets of the template without effect.

    Raises:
        ApiError: it sets such a thing.
    """
    for notice in said.notices:
        if (notice.param or "").startswith(KWARGS):
            raise bad_request(notice.message, param=notice.param)


def _variables(asked: Mapping[str, Any], chat: ChatFormat, lost: list[Notice]) -> dict[str, Any]:
    """What a body sets of the template. Names that other fields set, or nobody may set, are none of its variables."""
    found = {name: value for name, value in asked.items() if name in chat.variables}
    for name in asked:
        if name not in found and name not in _SWITCHES:
            why = "the model's template has no such variable that a request may set"
            lost.append(_no_effect(f"{KWARGS}.{name}", why))
    return found


def _thoughts(messages: Sequence[ChatMessage]) -> Iterator[Notice]:
    """The reasoning of messages, for a model whose format has no place for it."""
    for index, message in enumerate(messages):
        if message.thoughts:
            path = f"messages[{index}].reasoning{'_content' if message.reasoning_content else ''}"
            yield _no_effect(path, "this model's chat format has no place for reasoning")


def _unwritten(messages: Sequence[ChatMessage]) -> Iterator[Notice]:
    """The names of speakers, for which a format has no place."""
    for index, message in enumerate(messages):
        if message.name and message.role != "tool":  # the call says which tool it is
            why = "this model's prompt has no place for names; write it in the content"
            yield _no_effect(f"messages[{index}].name", why)


def _no_effect(path: str, why: str) -> Notice:
    return Notice(code="no_effect", message=f"{path} had no effect: {why}", param=path)


def _thinking(
    body: ChatCompletionBody, chat: ChatFormat, lost: list[Notice]
) -> tuple[bool | None, int | None]:
    said: dict[str, bool] = {}
    if body.thinking is not None:
        said["thinking"] = body.thinking.type == "enabled"
    for switch in _SWITCHES:
        path, value = f"{KWARGS}.{switch}", (body.chat_template_kwargs or {}).get(switch)
        if value and not chat.thinking:
            why = "the model's template has no switch for thinking"
            lost.append(_no_effect(path, why))
        elif value is not None:
            said[path] = value
    if body.reasoning_effort is not None:
        wanted = body.reasoning_effort not in ("none", "minimal")
        if wanted and not chat.thinking:  # agents send it to every model
            why = "this model's chat format has no switch for thinking"
            lost.append(_no_effect("reasoning_effort", why))
        else:
            said["reasoning_effort"] = wanted
    for name, wanted in said.items():
        if wanted and not chat.thinking:
            lack = (
                "this server does not steer reasoning with this model, whose chat format has no switch for it"
            )
            raise bad_request(f"{name} cannot switch thinking on: {lack}", param=name)
        if wanted != next(iter(said.values())):
            raise bad_request(f"{' and '.join(said)} contradict each other; send one of them", param=name)
    budgets = {
        "thinking.budget_tokens": body.thinking.budget_tokens if body.thinking is not None else None,
        "thinking_token_budget": body.thinking_token_budget,
    }
    given = {name: value for name, value in budgets.items() if value is not None}
    thinking = next(iter(said.values()), None)
    if given and not thinking:
        name = next(iter(given))
        raise bad_request(f"{name} needs thinking to be switched on", param=name)
    if len(set(given.values())) > 1:
        raise bad_request(f"{' and '.join(given)} are two names of one limit; send one", param="thinking")
    if given and (body.presence_penalty or body.frequency_penalty):
        raise bad_request(
            "a thinking budget cannot be combined with presence_penalty or frequency_penalty, which would "
            "forget the reasoning when it is cut; leave one of them out",
            param=next(iter(given)),
        )
    return thinking, next(iter(given.values()), None)


def _messages(messages: Sequence[ChatMessage], chat: ChatFormat) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    waiting: dict[str, int] = {}  # id of a call without a result -> the index in `out` for the result
    for index, message in enumerate(messages):
        _check(message, f"messages[{index}]", chat)
        if waiting and message.role != "tool":
            raise bad_request(
                f"messages[{index}] comes before the result of the call {next(iter(waiting))!r}; send a message of "
                "role 'tool' for every call",
                param=f"messages[{index}]",
            )
        made: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.text()}
        if message.name:
            made["name"] = message.name
        if message.role == "tool":
            place = waiting.pop(message.tool_call_id or "", None)
            if place is None:
                raise bad_request(
                    f"messages[{index}].tool_call_id is not the id of a call that waits for its result",
                    param=f"messages[{index}].tool_call_id",
                )
            out[place] = made | {"tool_call_id": message.tool_call_id}
            continue
        if message.thoughts:
            made["reasoning_content"] = message.thoughts
        out.append(made)
        if message.tool_calls:
            made["tool_calls"] = [_call(call) for call in message.tool_calls]
            waiting = {call.id: len(out) + n for n, call in enumerate(message.tool_calls)}
            if len(waiting) < len(message.tool_calls):
                raise bad_request(
                    f"messages[{index}].tool_calls must have an id each of their own",
                    param=f"messages[{index}].tool_calls",
                )
            out += [{} for _ in waiting]  # places for the results, which may come in any order
    if waiting:
        raise bad_request(
            f"the call {next(iter(waiting))!r} has no result; end with a message of role 'tool' for every call",
            param="messages",
        )
    return out


def _call(call: PastCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _check(message: ChatMessage, path: str, chat: ChatFormat) -> None:
    if message.role not in ROLES and not chat.writes_role(message.role):
        raise bad_request(
            f"{path}.role must be 'system', 'developer', 'user', 'assistant' or 'tool'", param=f"{path}.role"
        )
    if not chat.tools and (message.role == "tool" or message.tool_calls):
        name = "role" if message.role == "tool" else "tool_calls"
        may = "'system', 'developer', 'user' or 'assistant'" if name == "role" else "empty"
        raise bad_request(f"{path}.{name} must be {may}: {NO_TOOLS}", param=f"{path}.{name}")
    for name, role in (
        ("tool_calls", "assistant"),
        ("reasoning_content", "assistant"),
        ("reasoning", "assistant"),
        ("tool_call_id", "tool"),
    ):
        if getattr(message, name) and message.role != role:
            raise bad_request(
                f"{path}.{name} belongs into messages of role '{role}'; leave it out", param=f"{path}.{name}"
            )
    if message.content is None and not message.tool_calls:
        raise bad_request(
            f"{path}.content is required; it must be a string or a list of parts "
            'like {"type": "text", "text": "..."}',
            param=f"{path}.content",
            code="missing_field" if "content" not in message.model_fields_set else "invalid_value",
        )
