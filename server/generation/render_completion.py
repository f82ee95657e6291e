"""Turns text deltas into the objects of /v1/completions. Knows no engine."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from engine.protocol import TokenLogprob
from server.generation.choice import Job, TextDelta
from server.generation.streamed import LEAST, Head, Shown, Streamed, output_ids
from server.http.protocol.completions import Completion, CompletionChoice, CompletionLogprobs
from server.http.protocol.usage import Usage
from server.text.tokenizer import Tokenizer


class CompletionRenderer(Streamed):
    """Renders /v1/completions."""

    def __init__(
        self,
        head: Head,
        *,
        text: Tokenizer,
        jobs: Sequence[Job],
        shown: Shown,
        echoes: Sequence[str],
    ) -> None:
        super().__init__(head, text=text, jobs=jobs, shown=shown)
        self._echoes = echoes
        self._offsets = [_Offsets(text) for _ in echoes]

    def chunks(self, delta: TextDelta) -> Sequence[BaseModel]:
        """Return the chunk for a delta. The first chunk of a choice begins with the echo."""
        first = delta.index not in self._opened
        text = self._with_echo(delta.index, delta.text)
        if (
            not text
            and not (delta.shows_tokens and delta.token_ids)
            and not delta.logprobs
            and not delta.prompt_logprobs
            and delta.finish_reason is None
        ):
            return []
        return [self._completion([self._choice(delta.index, text, [delta], first=first, stream=True)])]

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The chunk without choices that ends a stream."""
        return self._completion([], usage)

    def whole(self, choices: Sequence[Sequence[TextDelta]], usage: Usage) -> BaseModel:
        """The response without streaming."""
        rendered = []
        for index, deltas in enumerate(choices):
            text = self._with_echo(index, "".join(delta.text for delta in deltas))
            rendered.append(self._choice(index, text, deltas, first=True, stream=False))
        return self._completion(rendered).model_copy(update={"usage": usage})

    def _with_echo(self, index: int, text: str) -> str:
        if index in self._opened:
            return text
        self._opened.add(index)
        return self._echoes[index] + text

    def _choice(
        self, index: int, text: str, deltas: Sequence[TextDelta], *, first: bool, stream: bool
    ) -> CompletionChoice:
        last = deltas[-1]
        choice = CompletionChoice(
            index=index,
            text=text,
            logprobs=self._logprobs(index, deltas),
            finish_reason="length" if last.finish_reason == "length" else last.finish_reason and "stop",
        )
        fields: dict[str, Any] = (
            {} if stream else {"prompt_token_ids": None, "token_ids": None, "prompt_logprobs": None}
        )
        if last.finish_reason is not None:
            fields["stop_reason"] = last.stop_reason
        if self._shown.token_ids:
            if first:
                fields["prompt_token_ids"] = list(self._jobs[index].submit.prompt_token_ids)
            fields["token_ids"] = [token_id for delta in deltas for token_id in output_ids(delta)]
        if self._shown.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs(index, deltas)
        return choice.model_copy(update=fields)

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(
            id=self._head.id,
            object="text_completion",
            created=self._head.created,
            model=self._head.model,
            system_fingerprint=self._head.fingerprint,
            choices=choices,
            **self._chunk_usage(usage),
            **self._first_notices(),
        )

    def _logprobs(self, index: int, deltas: Sequence[TextDelta]) -> CompletionLogprobs | None:
        if self._shown.logprobs is None:
            return None
        if all(delta.logprobs is None and delta.prompt_logprobs is None for delta in deltas):
            return None
        out = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        ids = self._jobs[index].submit.prompt_token_ids
        # The echo of a prompt that was sent as ids spells its control tokens out.
        spelled = bool(self._echoes[index]) and self._echoes[index] == self._text.decode(
            ids, skip_special=False
        )
        for delta in deltas:
            prompt = (delta.prompt_logprobs or ()) if self._shown.echo else ()
            for token_id, entry in zip(ids, prompt, strict=False):
                self._add(out, index, token_id, entry, spelled=spelled)
            for token in delta.logprobs or ():
                self._add(out, index, token.token_id, token)
        return out

    def _add(
        self,
        out: CompletionLogprobs,
        index: int,
        token_id: int,
        entry: TokenLogprob | None,
        *,
        spelled: bool = False,
    ) -> None:
        out.tokens.append(self._token_name(token_id))
        out.text_offset.append(self._offsets[index].next(token_id, spelled=spelled))
        out.token_logprobs.append(None if entry is None else max(entry.logprob, LEAST))
        out.top_logprobs.append(None if entry is None else self._top(entry))

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        # The chosen one first, as clients of vLLM expect. Two tokens may have the same text (halves of characters).
        for token_id, logprob in ((entry.token_id, entry.logprob), *entry.top[: self._shown.logprobs]):
            top.setdefault(self._token_name(token_id), max(logprob, LEAST))
        return top


class _Offsets:
    """Where each token begins in the text, counted in characters."""

    def __init__(self, text: Tokenizer) -> None:
        self._text = text
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._length = 0

    def next(self, token_id: int, *, spelled: bool = False) -> int:
        start = self._length
        if spelled or token_id not in self._text.special_ids:
            self._length += len(self._utf8.decode(bytes(self._text.token_bytes(token_id))))
        return start
