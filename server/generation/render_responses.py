"""Turns text deltas into the objects of /v1/responses: a whole response, and the events of a stream. Knows no engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from engine.protocol import TokenLogprob
from server.chat.parts import CallArguments, CallStart, Content, Part, Reasoning, Warn, merge
from server.generation.choice import TextDelta
from server.generation.render import new_call_id, warning
from server.generation.streamed import LEAST, Head, output_ids
from server.http.protocol import sse
from server.http.protocol.chat import ChoiceWarning
from server.http.protocol.errors import ApiError
from server.http.protocol.notices import Notice
from server.http.protocol.responses import (
    RawMessage,
    ResponseBody,
    ResponseFault,
    ResponseObject,
    ResponseTokens,
)
from server.http.protocol.usage import CompletionTokensDetails, Usage
from server.text.tokenizer import Tokenizer

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class ResponsesRenderer:
    """Renders /v1/responses. An answer is a list of items, and at most one item is open.

    Args:
        head: what every object of the answer has.
        body: the request, which the response repeats in part.
        keep: is called with the finished response.
        text: the model's tokenizer.
        prompt: the token ids of the prompt.
    """

    def __init__(
        self,
        head: Head,
        body: ResponseBody,
        keep: Callable[[ResponseObject], None],
        text: Tokenizer,
        prompt: Sequence[int] = (),
    ) -> None:
        self._head = head
        self._prompt = prompt
        self._output: list[int] = []  # with `enable_response_messages`
        self._text = text
        self._logprobs: list[dict[str, Any]] = []  # of the open item
        self._new_logprobs: list[dict[str, Any]] = []  # that no event has told
        self._body = body
        self._keep = keep
        self._number = 0  # of the next event
        self._items: list[dict[str, Any]] = []
        self._kind: str | None = None  # of the open item, which is the last one
        self._said: list[str] = []  # the text of the open item, in pieces
        self._warnings: list[Notice | ChoiceWarning] = list(head.notices)
        self._cut = False

    def opening(self) -> bytes:
        """The response without output, twice, as OpenAI has it."""
        response = self._dump(self._response("in_progress"))
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def events(self, delta: TextDelta) -> bytes:
        """The events of a delta."""
        self._cut |= delta.finish_reason == "length"
        if self._body.enable_response_messages:
            self._output += output_ids(delta)
        self._new_logprobs += [self._logprob(token) for token in delta.logprobs or ()]
        if delta.only_text and self._kind == "message":
            return self._grow("response.output_text.delta", delta.text) if delta.text else b""
        return b"".join(self._part(part) for part in merge(delta.parts))

    def ending(self, usage: Usage) -> bytes:
        """The end of the open item and of the response."""
        ended = self._end()
        response = self._finish(usage)
        return ended + self._event(f"response.{response.status}", response=self._dump(response))

    def failure(self, error: ApiError) -> bytes:
        """The failed response."""
        return self._event("response.failed", response=self._dump(self.failed(error)))

    def waiting(self, status: Status) -> ResponseObject:
        """The response before it has an answer."""
        return self._response(status)

    def failed(self, error: ApiError) -> ResponseObject:
        """The response that has an error in place of an answer."""
        fault = ResponseFault(code=error.detail.code or "server_error", message=error.detail.message)
        return self._response("failed", error=fault)

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> ResponseObject:
        """The response without streaming."""
        (deltas,) = choices
        for delta in deltas:
            self.events(delta)
        self._end()
        return self._finish(usage)

    def _part(self, part: Part) -> bytes:
        match part:
            case Content(text):
                return self._open_text("message", role="assistant") + self._grow(
                    "response.output_text.delta", text
                )
            case Reasoning(text):
                return self._open_text("reasoning", summary=[]) + self._grow(
                    "response.reasoning_text.delta", text
                )
            case CallStart(_, name):
                return self._end() + self._begin(
                    "function_call", call_id=new_call_id(), name=name, arguments=""
                )
            case CallArguments(_, text):
                return self._grow("response.function_call_arguments.delta", text)
            case Warn():
                self._warnings.append(warning(part))
                return b""

    def _open_text(self, kind: str, **fields: Any) -> bytes:
        """Open an item with text, unless one is open."""
        if self._kind == kind:
            return b""
        begun = self._end() + self._begin(kind, **fields, content=[])
        return begun + self._event("response.content_part.added", **self._where(), part=_part_of(kind, ""))

    def _begin(self, kind: str, **fields: Any) -> bytes:
        prefix = {"message": "msg", "reasoning": "rs"}.get(kind, "fc")
        item = {"id": f"{prefix}_{secrets.token_hex(12)}", "type": kind, "status": "in_progress", **fields}
        self._items.append(item)
        self._kind, self._said, self._logprobs = kind, [], []
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _grow(self, name: str, text: str) -> bytes:
        self._said.append(text)
        where = self._where()
        if self._kind == "message":
            where["logprobs"] = new = self._new_logprobs
            self._logprobs += new
            self._new_logprobs = []
        return self._event(name, **where, delta=text)

    def _end(self) -> bytes:
        """Close the open item."""
        if self._kind is None:
            return b""
        kind, text, item, where = self._kind, "".join(self._said), self._items[-1], self._where()
        self._kind = None
        if kind == "function_call":
            item["arguments"] = text
            ended = self._event(
                "response.function_call_arguments.done", **where, name=item["name"], arguments=text
            )
        else:
            if kind == "message":
                self._logprobs += self._new_logprobs
            self._new_logprobs = []
            part = _part_of(kind, text, self._logprobs)
            item["content"] = [part]
            name = "output_text" if kind == "message" else "reasoning_text"
            logprobs: dict[str, Any] = {"logprobs": self._logprobs} if kind == "message" else {}
            ended = self._event(f"response.{name}.done", **where, text=text, **logprobs)
            ended += self._event("response.content_part.done", **where, part=part)
        item["status"] = "incomplete" if self._cut else "completed"
        return ended + self._event("response.output_item.done", output_index=where["output_index"], item=item)

    def _logprob(self, token: TokenLogprob) -> dict[str, Any]:
        """A token with its alternatives."""

        def named(token_id: int, logprob: float) -> dict[str, Any]:
            return {
                "token": self._text.token_text(token_id),
                "logprob": max(logprob, LEAST),
                "bytes": self._text.token_bytes(token_id),
            }

        top = [named(token_id, logprob) for token_id, logprob in token.top]
        return {**named(token.token_id, token.logprob), "top_logprobs": top}

    def _where(self) -> dict[str, Any]:
        where: dict[str, Any] = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return where if self._kind == "function_call" else where | {"content_index": 0}

    def _event(self, name: str, /, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: " + name.encode() + b"\n" + sse.event(msgspec.json.encode(event).decode())

    def _finish(self, usage: Usage) -> ResponseObject:
        details = usage.completion_tokens_details or CompletionTokensDetails(reasoning_tokens=0)
        tokens = ResponseTokens(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=usage.prompt_tokens_details,
            output_tokens=usage.completion_tokens,
            output_tokens_details=details,
            total_tokens=usage.total_tokens,
            dsa=usage.dsa,
            cost=usage.cost,
            cost_details=usage.cost_details,
        )
        response = self._response("incomplete" if self._cut else "completed", usage=tokens)
        self._keep(response)
        return response

    def _response(
        self, status: Status, *, usage: ResponseTokens | None = None, error: ResponseFault | None = None
    ) -> ResponseObject:
        body, head = self._body, self._head
        choice = body.tool_choice or "auto"
        effort = body.reasoning.effort if body.reasoning is not None else None
        fields: dict[str, Any] = {"warnings": self._warnings} if self._warnings else {}
        if body.enable_response_messages:
            fields["input_messages"] = [self._raw(self._prompt)]
            fields["output_messages"] = [self._raw(self._output)] if self._output else []
        return ResponseObject(
            id=head.id,
            object="response",
            created_at=head.created,
            status=status,
            model=head.model,
            output=[dict(item) for item in self._items] if status not in ("queued", "in_progress") else [],
            error=error,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            instructions=body.instructions,
            previous_response_id=body.previous_response_id,
            store=body.store is not False,
            max_output_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            tools=[tool.model_dump() for tool in body.tools or ()],
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={"effort": effort, "summary": None},
            text={"format": _format_of(body)},
            truncation="disabled",
            background=bool(body.background),
            metadata=body.metadata or {},
            user=body.user,
            usage=usage,
            **fields,
        )

    def _raw(self, token_ids: Sequence[int]) -> RawMessage:
        text = self._text.decode(token_ids, skip_special=False)
        return RawMessage(type="raw_message_tokens", message=text, tokens=list(token_ids))

    @staticmethod
    def _dump(response: ResponseObject) -> dict[str, Any]:
        return response.model_dump(mode="json", exclude_unset=True)


def _format_of(body: ResponseBody) -> dict[str, Any]:
    wanted = body.text.format if body.text is not None else None
    return {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_unset=True)


def _part_of(kind: str, text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
