"""Reads the token ids of one answer into parts: content, reasoning, tool calls.

Control tokens are recognised by their ids, never by their spelling, so a model may write about its own
markers. Stop strings end the content; in reasoning and in arguments they are ordinary text.
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
        tokenizer: the model's tokenizer.
        parser: a new parser of the chat format.
        stop: texts that end the content.
        include_stop: the content has the stop string that ended it.
        skip_special: control tokens without a meaning are left out; else they are content.
        min_tokens: the text of so many tokens is not searched for stop strings.
        budget: after so many tokens of reasoning the answer is redirected to `closing`; None is no limit.
        closing: the tokens that end reasoning.
        opening: the tokens that open a call; they must follow the reasoning. Empty if no call is required.
        opened: the tokens at the end of the prompt that already belong to the answer.
        must_call: report an answer without a call.

    Attributes:
        ended: the answer is complete; more tokens of the engine are not wanted.
        redirect: tokens that must follow those read so far, instead of the engine's next tokens.
        tokens_consumed: how many of the engine's tokens were read.
        reasoning_tokens: how many of these are reasoning, without the tokens that end it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        parser: Parser,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        min_tokens: int = 0,
        budget: int | None = None,
        closing: tuple[int, ...] = (),
        opening: tuple[int, ...] = (),
        opened: tuple[int, ...] = (),
        must_call: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._stream = text_stream(tokenizer, skip_special=False)
        self._stop = StopScanner(stop, include_stop=include_stop)
        self._skip_special = skip_special
        self._min_tokens = min_tokens
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
    def stopped(self) -> str | None:
        """The stop string that ended the content; None if none did."""
        return self._stop.stopped

    @property
    def called(self) -> bool:
        """Whether the model completed a call."""
        return self._parser.calls > 0

    def push(self, token_ids: Sequence[int]) -> list[Part]:
        """Read tokens of the engine until the answer ends or is redirected. Return the parts that are certain now."""
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
        """End the answer: return the text that was held back, and reports of what is missing."""
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
        if token_id in self._tokenizer.special_ids and self._skip_special:
            return []  # an end token of a request that ignores end tokens
        return self._parser.text(self._stream.push(token_id))

    def _checked(self, parts: Sequence[Part]) -> list[Part]:
        """Search the content of `parts` for stop strings, and note whether the answer has ended."""
        out: list[Part] = []
        for part in parts:
            if isinstance(part, Content) and self.tokens_consumed <= self._min_tokens:
                out.append(part)
                continue
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
