"""Compiles the grammars of requests in the engine: on a thread, so that no step waits, and each grammar once.

The server has had every grammar compiled under limits before (`engine.grammar`), so the thread is not held up for long.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

from engine.errors import GRAMMAR_FAULT, GrammarError
from engine.grammar import GrammarCompiler, Matcher
from engine.protocol import Submit, Vocabulary

KEPT = 64
"""Compiled grammars that are kept; those used least recently go first."""


@dataclass(frozen=True)
class Compiled:
    """A request whose grammar is compiled, or why it is not."""

    request: Submit
    matcher: Matcher | None
    error: str = ""


class Grammars:
    """The compiled grammars of one engine.

    Args:
        vocabulary: the tokenizer's
        vocab_size: of the model
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self._vocabulary, self._vocab_size = vocabulary, vocab_size
        self._compiler: GrammarCompiler | None = None  # made with the first grammar: many servers see none
        self._kept: OrderedDict[str, Matcher] = OrderedDict()
        self._lock = threading.Lock()
        self._asked: SimpleQueue[Submit] | None = None

    def kept(self, text: str) -> Matcher | None:
        """A matcher at the beginning of a grammar that was compiled before, else None."""
        with self._lock:
            matcher = self._kept.get(text)
            if matcher is None:
                return None
            self._kept.move_to_end(text)
            return matcher.copy()

    def compile(self, request: Submit) -> Compiled:
        """Compile the grammar of a request, now."""
        assert request.grammar is not None
        text = request.grammar.text
        matcher = self.kept(text)
        if matcher is None:
            try:
                if self._compiler is None:
                    self._compiler = GrammarCompiler(self._vocabulary, self._vocab_size)
                made = self._compiler.compile(text)
            except GrammarError as error:
                return Compiled(request, None, f"{GRAMMAR_FAULT}: {error}")
            with self._lock:
                self._kept[text] = made
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
                matcher = made.copy()
        return Compiled(request, matcher)

    def compile_apart(self, request: Submit, then: Callable[[Compiled], None]) -> None:
        """Compile the grammar of a request on a thread, which calls `then`."""
        if self._asked is None:
            self._asked = SimpleQueue()
            threading.Thread(target=self._work, args=(self._asked, then), daemon=True).start()
        self._asked.put(request)

    def _work(self, asked: SimpleQueue[Submit], then: Callable[[Compiled], None]) -> None:
        while True:
            then(self.compile(asked.get()))
