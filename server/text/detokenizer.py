"""Decodes tokens a few at a time. It holds back half characters and text that may begin a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from server.text.stream import text_stream
from server.text.tokenizer import Tokenizer


class StopScanner:
    """Finds the first stop string in a text that comes in pieces, and holds back text that may begin one.

    Attributes:
        stopped: the stop string that was found, else None; further pushes return "".
    """

    def __init__(self, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        if "" in stop:
            raise ValueError("a stop string must have at least one character")
        self._stop = tuple(dict.fromkeys(stop))
        self._include_stop = include_stop
        self._held = ""
        self.stopped: str | None = None

    def push(self, text: str) -> str:
        """Add text; return the text that is now certain."""
        if self.stopped is not None:
            return ""
        if not self._stop:
            return text
        pending = self._held + text
        found = self._first_stop(pending)
        if found is not None:
            start, self.stopped = found
            self._held = ""
            return pending[: start + len(self.stopped) if self._include_stop else start]
        keep = self._possible_start(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """Return the text that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, pending: str) -> tuple[int, str] | None:
        places = ((pending.find(stop), stop) for stop in self._stop)
        ends = [(start + len(stop), start, stop) for start, stop in places if start >= 0]
        if not ends:
            return None
        _, start, stop = min(ends)
        return start, stop

    def _possible_start(self, pending: str) -> int:
        """The length of the longest end of `pending` that begins a stop string."""
        longest = min(max(len(stop) for stop in self._stop) - 1, len(pending))
        for length in range(longest, 0, -1):
            tail = pending[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0


class Detokenizer:
    """Decodes one generation. The returned texts, joined, are the decoded tokens up to the first stop string.

    The first stop string is the one that is complete first; of those that end at the same character it is
    the longest. So the text does not depend on how tokens are grouped into pushes.

    Attributes:
        stopped: the stop string that was found, else None; further pushes return "".
        tokens_consumed: how many tokens were read, up to and including the one that completed the
            stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        after: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        """Nothing is read.

        Args:
            tokenizer: of the model
            stop: texts that end the generation
            include_stop: the text has the stop string
            skip_special: leave control tokens out
            after: the tokens before the generation, whose text it continues
            min_tokens: the text of so many tokens is not searched for stop strings
        """
        self._min_tokens = min_tokens
        self._stream = text_stream(tokenizer, skip_special=skip_special, after=after)
        self._scanner = StopScanner(stop, include_stop=include_stop)
        self._stops = len(stop) > 0
        self.tokens_consumed = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that was found; None before."""
        return self._scanner.stopped

    def push(self, token_ids: Sequence[int]) -> str:
        """Add tokens; return the text that is now certain."""
        if not self._stops:
            self.tokens_consumed += len(token_ids)
            return "".join(map(self._stream.push, token_ids))
        out: list[str] = []
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.tokens_consumed += 1
            text = self._stream.push(token_id)
            if text:
                out.append(text if self.tokens_consumed <= self._min_tokens else self._scanner.push(text))
        return "".join(out)

    def finish(self) -> str:
        """Return the text that was held back, at the end of the generation."""
        if self.stopped is not None:
            return ""
        text = self._scanner.push(self._stream.finish())
        return text + self._scanner.finish()
