"""Turns text deltas into Anthropic's objects: a whole message, and the events of a stream. Knows no engine."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

from server.chat.parts import CallArguments, CallStart, Content, Part, Reasoning, Warn, merge
from server.generation.choice import TextDelta
from server.generation.render import warning
from server.generation.streamed import Head
from server.http.protocol import sse
from server.http.protocol.chat import ChoiceWarning
from server.http.protocol.errors import ApiError
from server.http.protocol.messages import (
    BlockDelta,
    BlockStart,
    BlockStop,
    InputAdded,
    MessageChange,
    MessageEnd,
    MessageStart,
    MessageStop,
    MessagesUsage,
    OutputBlock,
    OutputMessage,
    StopReason,
    TextAdded,
    TextOut,
    ThinkingAdded,
    ThinkingOut,
    ToolUseOut,
)
from server.http.protocol.notices import Notice
from server.http.protocol.usage import Usage

_REASONS: dict[str | None, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessagesRenderer:
    """Renders /v1/messages. An answer is a list of blocks, and at most one block is open."""

    def __init__(self, head: Head, *, prompt_tokens: int) -> None:
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._index = -1  # of the newest block
        self._kind: str | None = None  # of the open block
        self._warnings: list[ChoiceWarning] = []
        self._last: TextDelta | None = None
        self._text_event: sse.TextEvent | None = None  # of the open block

    def opening(self) -> bytes:
        """The message without content. Its usage says how long the prompt is; the last event says what was reused."""
        usage = MessagesUsage(
            input_tokens=self._prompt_tokens,
            cache_creation_input_tokens=0,
            cache_read_input_tokens=0,
            output_tokens=0,
        )
        fields: dict[str, Any] = {"warnings": list(self._head.notices)} if self._head.notices else {}
        message = self._message([], None, usage, **fields)
        return sse.chunk(MessageStart(type="message_start", message=message), "message_start")

    def events(self, delta: TextDelta) -> bytes:
        """The events of a delta."""
        if delta.finish_reason is not None:
            self._last = delta
        if delta.only_text and self._text_event is not None:
            return self._text_event(delta.text) if delta.text else b""
        return b"".join(self._part(part) for part in merge(delta.parts))

    def _part(self, part: Part) -> bytes:
        match part:
            case Content(text):
                begun = self._begin("text", TextOut(type="text", text=""))
                if begun:
                    index = self._index
                    self._text_event = sse.TextEvent(
                        lambda text: BlockDelta(
                            type="content_block_delta",
                            index=index,
                            delta=TextAdded(type="text_delta", text=text),
                        ),
                        "content_block_delta",
                    )
                assert self._text_event is not None
                return begun + self._text_event(text)
            case Reasoning(text):
                begun = self._begin("thinking", ThinkingOut(type="thinking", thinking="", signature=""))
                return begun + self._grow(ThinkingAdded(type="thinking_delta", thinking=text))
            case CallStart(_, name):
                call = ToolUseOut(type="tool_use", id=_call_id(), name=name, input={})
                return self._end() + self._begin("tool_use", call)
            case CallArguments(_, text):
                return self._grow(InputAdded(type="input_json_delta", partial_json=text))
            case Warn():
                self._warnings.append(warning(part))
                return b""

    def _begin(self, kind: str, block: OutputBlock) -> bytes:
        """Open a block of a kind, unless one is open."""
        if self._kind == kind:
            return b""
        ended = self._end()
        self._index += 1
        self._kind = kind
        start = BlockStart(type="content_block_start", index=self._index, content_block=block)
        return ended + sse.chunk(start, "content_block_start")

    def _grow(self, added: ThinkingAdded | InputAdded) -> bytes:
        delta = BlockDelta(type="content_block_delta", index=self._index, delta=added)
        return sse.chunk(delta, "content_block_delta")

    def _end(self) -> bytes:
        if self._kind is None:
            return b""
        self._kind = self._text_event = None
        return sse.chunk(BlockStop(type="content_block_stop", index=self._index), "content_block_stop")

    def ending(self, usage: Usage) -> bytes:
        """The end of the open block and of the message."""
        fields: dict[str, Any] = {"warnings": self._warnings} if self._warnings else {}
        change = MessageChange(type="message_delta", delta=_end_of(self._last), usage=_usage(usage), **fields)
        return (
            self._end()
            + sse.chunk(change, "message_delta")
            + sse.chunk(MessageStop(type="message_stop"), "message_stop")
        )

    def failure(self, error: ApiError) -> bytes:
        """The error as an event."""
        return b"event: error\n" + sse.event(error.to_messages_json())

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> OutputMessage:
        """The message without streaming."""
        (deltas,) = choices
        blocks: list[OutputBlock] = []
        warnings: list[Notice | ChoiceWarning] = list(self._head.notices)
        arguments: dict[int, str] = {}  # place of a call's block -> the JSON text of its input
        for part in merge(part for delta in deltas for part in delta.parts):
            match part:
                case Content(text):
                    blocks.append(TextOut(type="text", text=text))
                case Reasoning(text):
                    blocks.append(ThinkingOut(type="thinking", thinking=text, signature=""))
                case CallStart(_, name):
                    arguments[len(blocks)] = ""
                    blocks.append(ToolUseOut(type="tool_use", id=_call_id(), name=name, input={}))
                case CallArguments(_, text):
                    arguments[max(arguments)] += text
                case Warn():
                    warnings.append(warning(part))
        for number, (place, text) in enumerate(arguments.items()):
            made = _object(text)
            blocks[place] = blocks[place].model_copy(update={"input": made or {}})
            if made is None:
                message = "the model's arguments are not a JSON object, so the input is empty"
                warnings.append(
                    ChoiceWarning(code="invalid_arguments", message=message, tool_call=number, raw=text)
                )
        fields: dict[str, Any] = {"warnings": warnings} if warnings else {}
        return self._message(blocks, _end_of(deltas[-1]), _usage(usage), **fields)

    def _message(
        self, blocks: list[OutputBlock], end: MessageEnd | None, usage: MessagesUsage, **fields: Any
    ) -> OutputMessage:
        return OutputMessage(
            id=self._head.id,
            type="message",
            role="assistant",
            model=self._head.model,
            content=blocks,
            stop_reason=None if end is None else end.stop_reason,
            stop_sequence=None if end is None else end.stop_sequence,
            usage=usage,
            **fields,
        )


def _call_id() -> str:
    return f"toolu_{secrets.token_hex(12)}"


def _object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text spells; None if it spells none."""
    try:
        made = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) else None


def _end_of(last: TextDelta | None) -> MessageEnd:
    finish = None if last is None else last.finish_reason
    stopped = None if last is None else last.stop_reason
    if finish == "stop" and isinstance(stopped, str):
        return MessageEnd(stop_reason="stop_sequence", stop_sequence=stopped)
    return MessageEnd(stop_reason=_REASONS.get(finish, "end_turn"), stop_sequence=None)


def _usage(usage: Usage) -> MessagesUsage:
    cached = usage.prompt_tokens_details.cached_tokens
    return MessagesUsage(
        input_tokens=usage.prompt_tokens - cached,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=cached,
        output_tokens=usage.completion_tokens,
        dsa=usage.dsa,
        cost=usage.cost,
        cost_details=usage.cost_details,
    )
