"""Turns text deltas into the objects of a chat: whole answers and the chunks of a stream. Knows no engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from engine.protocol import TokenLogprob
from server.chat.parts import CallArguments, CallStart, Content, Reasoning, Warn, merge
from server.generation.choice import ChoiceUsage, Job, TextDelta
from server.generation.streamed import LEAST, Head, Shown, Streamed, output_ids
from server.http.protocol.chat import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    ChatTokenLogprob,
    ChoiceWarning,
    MessageDelta,
    TopLogprob,
)
from server.http.protocol.errors import ApiError
from server.http.protocol.tools import FunctionCall, FunctionDelta, ToolCall, ToolCallDelta
from server.http.protocol.usage import (
    CompletionTokensDetails,
    PromptTokensDetails,
    SparsityUsage,
    Usage,
)
from server.text.tokenizer import Tokenizer

NO_INDEXER = "this model has no trained indexer, so attention was dense"


class Renderer(Protocol):
    """Makes one endpoint's response objects for one request."""

    def opening(self) -> bytes:
        """Return what a stream begins with, before there is any token."""
        ...

    def events(self, delta: TextDelta) -> bytes:
        """Return the events of a delta. Call it with the deltas in the order of their arrival."""
        ...

    def ending(self, usage: Usage) -> bytes:
        """Return the last events of a stream that has no error."""
        ...

    def failure(self, error: ApiError) -> bytes:
        """Return the last event of a stream that failed."""
        ...

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> BaseModel:
        """Return the response without streaming. `choices` has the deltas of each choice."""
        ...


def total_usage(usages: Sequence[ChoiceUsage], requested: int | None) -> Usage:
    """Sum the usage of all choices.

    Args:
        usages: at least one. Those of choices that share a prompt have its tokens once.
        requested: the client's `dsa.top_k` if the model could not grant it, else None.
    """
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    index_top_k = usages[0].index_top_k
    dsa = SparsityUsage(top_k="dense" if index_top_k is None else index_top_k)
    if requested is not None:
        dsa = SparsityUsage(top_k=dsa.top_k, requested=requested, note=NO_INDEXER)
    reasoning = [usage.reasoning_tokens for usage in usages if usage.reasoning_tokens is not None]
    total = Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(usage.cached_tokens for usage in usages)),
        dsa=dsa,
    )
    details = CompletionTokensDetails(reasoning_tokens=sum(reasoning))
    return total.model_copy(update={"completion_tokens_details": details}) if reasoning else total


def new_call_id() -> str:
    """Make the id of a tool call. The message with the call's result repeats it."""
    return f"call_{secrets.token_hex(12)}"


def warning(part: Warn) -> ChoiceWarning:
    """The client's form of a report that the model broke its format."""
    return ChoiceWarning(code=part.code, message=part.message, tool_call=part.index, raw=part.raw)


class ChatRenderer(Streamed):
    """Renders /v1/chat/completions.

    Args:
        head: of every object.
        text: the model's tokenizer.
        jobs: of the choices.
        shown: what is shown beside the text.
        echoes: for each choice, the text that it begins with; empty: there is none.
    """

    def __init__(
        self,
        head: Head,
        *,
        text: Tokenizer,
        jobs: Sequence[Job],
        shown: Shown,
        echoes: Sequence[str] = (),
    ) -> None:
        super().__init__(head, text=text, jobs=jobs, shown=shown)
        self._echoes = echoes or ("",) * len(jobs)

    def chunks(self, delta: TextDelta) -> Sequence[BaseModel]:
        """Return one chunk for each run of parts of one kind, because clients expect one kind in a chunk.

        The first chunk of a choice has the role. Its last chunk has the finish reason.
        """
        parts = merge(delta.parts)
        warnings = [warning(part) for part in parts if isinstance(part, Warn)]
        messages = [self._delta(delta.index, part) for part in parts if not isinstance(part, Warn)]
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            first = messages[0].model_dump(exclude_unset=True) if messages else {}
            if echo := self._echoes[delta.index]:
                first["content"] = echo + (first.get("content") or "")
            messages[:1] = [MessageDelta(**({"role": "assistant", "content": "", "refusal": None} | first))]
        elif not messages and (
            delta.logprobs
            or warnings
            or delta.finish_reason is not None
            or (delta.shows_tokens and delta.token_ids)
        ):
            messages = [MessageDelta()]
        choices = [
            ChatChunkChoice(
                index=delta.index,
                delta=message,
                logprobs=self._logprobs([delta]) if number == 0 else None,
                finish_reason=delta.finish_reason if number == len(messages) - 1 else None,
            )
            for number, message in enumerate(messages)
        ]
        if delta.finish_reason is not None:
            choices[-1] = choices[-1].model_copy(update={"stop_reason": delta.stop_reason})
        if self._shown.token_ids and choices:
            choices[0] = choices[0].model_copy(update={"token_ids": output_ids(delta)})
        if warnings:
            choices[-1] = choices[-1].model_copy(update={"warnings": warnings})
        return [self._chunk([choice]) for choice in choices]

    def _delta(self, choice: int, part: Content | Reasoning | CallStart | CallArguments) -> MessageDelta:
        match part:
            case Content(text):
                return MessageDelta(content=text)
            case Reasoning(text):
                if self._shown.reasoning == "reasoning":
                    return MessageDelta(reasoning=text)
                return MessageDelta(reasoning_content=text)
            case CallStart(index, name):
                function = FunctionDelta(name=name, arguments="")
                call = ToolCallDelta(index=index, id=new_call_id(), type="function", function=function)
                return MessageDelta(tool_calls=[call])
            case CallArguments(index, text):
                return MessageDelta(
                    tool_calls=[ToolCallDelta(index=index, function=FunctionDelta(arguments=text))]
                )

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The chunk without choices that ends a stream."""
        return self._chunk([], usage)

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> BaseModel:
        """The response without streaming."""
        return ChatCompletion(
            id=self._head.id,
            object="chat.completion",
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=[self._choice(index, deltas) for index, deltas in enumerate(choices)],
            usage=usage,
            **self._whole_fields(choices),
            **self._first_fields(),
        )

    def _whole_fields(self, choices: Sequence[Sequence[TextDelta]]) -> dict[str, Any]:
        if self._shown.prompt_logprobs is None:
            return {"prompt_logprobs": None}
        return {"prompt_logprobs": self._prompt_logprobs(0, choices[0])}

    def _first_fields(self) -> dict[str, Any]:
        """What only the first object of an answer has."""
        first, self._first = self._first, False
        if not first or not self._shown.token_ids:
            return self._first_notices()
        prompt = list(self._jobs[0].submit.prompt_token_ids)
        return {"prompt_token_ids": prompt, **self._first_notices()}

    def _choice(self, index: int, deltas: Sequence[TextDelta]) -> ChatChoice:
        parts = merge(part for delta in deltas for part in delta.parts)
        content = self._echoes[index] + "".join(part.text for part in parts if isinstance(part, Content))
        fields: dict[str, Any] = {}
        if reasoning := "".join(part.text for part in parts if isinstance(part, Reasoning)):
            fields[self._shown.reasoning] = reasoning
        calls = [part for part in parts if isinstance(part, CallStart)]
        arguments = ["" for _ in calls]
        for part in parts:
            if isinstance(part, CallArguments):
                arguments[part.index] += part.text
        if calls:
            fields["tool_calls"] = [
                ToolCall(
                    id=new_call_id(), type="function", function=FunctionCall(name=call.name, arguments=text)
                )
                for call, text in zip(calls, arguments, strict=True)
            ]
        message = AssistantMessage(
            role="assistant", content=None if calls and not content else content, refusal=None, **fields
        )
        choice = ChatChoice(
            index=index,
            message=message,
            logprobs=self._logprobs(deltas),
            finish_reason=deltas[-1].finish_reason or "stop",
            stop_reason=deltas[-1].stop_reason,
        )
        if self._shown.token_ids:
            token_ids = [token_id for delta in deltas for token_id in output_ids(delta)]
            choice = choice.model_copy(update={"token_ids": token_ids})
        warnings = [warning(part) for part in parts if isinstance(part, Warn)]
        return choice.model_copy(update={"warnings": warnings}) if warnings else choice

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._head.id,
            object="chat.completion.chunk",
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=choices,
            **self._chunk_usage(usage),
            **self._first_fields(),
        )

    def _logprobs(self, deltas: Sequence[TextDelta]) -> ChatLogprobs | None:
        if all(delta.logprobs is None for delta in deltas):
            return None
        return ChatLogprobs(
            content=[self._token(token) for delta in deltas for token in delta.logprobs or ()]
        )

    def _token(self, token: TokenLogprob) -> ChatTokenLogprob:
        top = [self._alternative(token_id, logprob) for token_id, logprob in token.top]
        own = self._alternative(token.token_id, token.logprob)
        return ChatTokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _alternative(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self._token_name(token_id),
            logprob=max(logprob, LEAST),
            bytes=self._text.token_bytes(token_id),
        )
