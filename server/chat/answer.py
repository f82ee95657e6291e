"""Token ids of one answer to its parts: content, reasoning, tool calls.

Control tokens are told by their ids and never by their spelling, so a model may write about its own
markers. Stop strings end the content; in reasoning and in arguments they are text.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.chat.parts import CallStart, Content, Parser, Part, Warn
from server.text.detokenizer import StopScanner
from server.text.stream import text_stream
from server.text.tokenizer import Tokenizer


class Answer:
    """Reads one answer.

    Args:
        tokenizer: of the model.
        parser: of the chat format.
        stop: texts that end the content.
        budget: after so many tokens of reasoning the reader asks to go on with `closing`.
        closing: what ends reasoning.
        opening: what comes right after reasoning, where a call is wanted.
        opened: what the prompt ends with that is part of the answer.
        must_call: an answer without a call is reported.

    Attributes:
        ended: the answer is complete, whatever the engine would still make.
        redirect: tokens to go on with after those that were read, in place of what the engine makes.
        tokens_consumed: tokens of the engine that were read.
        reasoning_tokens: those of them that are reasoning, without what ends it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: Parser,
        *,
        stop: Sequence[str] = (),
        budget: int | None = None,
        closing: tuple[int, ...] = (),
        opening: tuple[int, ...] = (),
        opened: tuple[int, ...] = (),
        must_call: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._stream = text_stream(tokenizer, skip_special=False)
        self._stop = StopScanner(stop)
        self._budget = budget
        self._closing = closing
        self._opening = opening
        self._must_call = must_call
        self._names = {token_id: text for text, token_id in tokenizer.control_tokens.items()}
        self._early = [part for token_id in opened for part in self._read(token_id)]
        self.redirect: tuple[int, ...] = ()
        self.ended = False
        self.tokens_consumed = 0
        self.reasoning_tokens = 0

    @property
    def called(self) -> bool:
        """The model completed a call."""
        return self._parser.calls > 0

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        """Read tokens of the engine, up to the end or to a redirection; return what is certain now."""
        parts, self._early = self._early, []
        self.redirect = ()
        for token_id in token_ids:
            if self.ended or self.redirect:
                break
            self.tokens_consumed += 1
            before = self._parser.thinking
            parts += self._checked(self._read(token_id))
            if before and self._parser.thinking:
                self.reasoning_tokens += 1
                if self.reasoning_tokens == self._budget:
                    self.redirect = self._closing + self._opening
            elif before and self._opening and token_id in self._closing:
                self.redirect = self._opening
            if self.redirect:
                self._opening = ()
                parts += [part for own in self.redirect for part in self._checked(self._read(own))]
        return parts

    def finish(self) -> list[Part]:
        """The engine is done: return what was held back and what is missing."""
        parts, self._early = self._early, []
        if not self.ended:
            parts += self._checked([*self._parser.text(self._stream.finish()), *self._parser.finish()])
            if rest := self._stop.finish():
                parts.append(Content(rest))
        if self._must_call and not self.called and not any(isinstance(part, Warn) for part in parts):
            parts.append(
                Warn("no_tool_call", "the model did not call a tool, though tool_choice asks for it")
            )
        return parts

    def _read(self, token_id: int) -> list[Part]:
        name = self._names.get(token_id)
        if name in self._parser.markers or (name and token_id not in self._tokenizer.special_ids):
            return [*self._parser.text(self._stream.finish()), *self._parser.marker(str(name))]
        if token_id in self._tokenizer.special_ids:
            return []  # the end of a sequence, where a request wants to go on after it
        return self._parser.text(self._stream.push(token_id))

    def _checked(self, parts: Sequence[Part]) -> list[Part]:
        """Look for stop strings in the content, and for the end."""
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Content):
                out.append(Content(self._stop.push(part.text)))
                if self._stop.stopped is not None:
                    self.ended = True
                    return out
                continue
            if isinstance(part, CallStart):
                out.append(Content(self._stop.finish()))
            out.append(part)
        self.ended = self._parser.ended
        return out
