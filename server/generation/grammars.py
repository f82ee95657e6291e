"""Checks that grammars compile before their requests begin: in processes with limits, so that only the sender pays.

A grammar may be made to take minutes or all of the memory. So a process of its own compiles it, and ends when it has taken too
much (`server.generation.grammar_worker`). What was found is remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import sys
from collections import OrderedDict

import msgspec

from engine.protocol import Vocabulary
from server.text.tokenizer import Tokenizer

WORKERS = 2
"""A grammar that takes long holds up one of them."""

CPU_SECONDS = 1
WALL_SECONDS = 20.0
MEMORY_BYTES = 1 << 30
"""A grammar may take no more to compile; the memory is what is added to that of the idle process."""

REMEMBERED = 1024
"""Verdicts that are kept; those used least recently go first."""

_HEADER_BYTES = 4


class UnfitGrammarError(Exception):
    """A grammar cannot be enforced; the message says why."""


class NoCompilerError(Exception):
    """Grammars cannot be checked now; the message says why."""


class Begin(msgspec.Struct, frozen=True):
    """The first message to a worker."""

    vocabulary: Vocabulary
    vocab_size: int
    cpu_seconds: int
    memory_bytes: int


class Candidate(msgspec.Struct, frozen=True):
    """A grammar to check; `own` is what it calls `@own`, in GBNF or Lark, or empty."""

    text: str
    own: str


class GrammarVerdict(msgspec.Struct, frozen=True):
    """The grammar as the engine wants it, or why there is none."""

    text: str
    error: str = ""


def vocabulary_of(text: Tokenizer) -> Vocabulary | None:
    """The tokens of a tokenizer, as grammars need them; None if no token ends an answer."""
    ends = text.eos_token_ids
    if not ends:
        return None
    return Vocabulary(
        tokens=tuple(text.raw(token_id) for token_id in range(text.vocab_size)),
        special=tuple(sorted(text.control_ids | text.special_ids | set(ends))),
        ends=ends,
    )


class GrammarChecks:
    """Checks grammars for one vocabulary. Its workers start when they are needed.

    Args:
        text: the model's tokenizer
    """

    def __init__(self, text: Tokenizer) -> None:
        self._text = text
        self._verdicts: OrderedDict[bytes, GrammarVerdict] = OrderedDict()
        self._idle: list[_Worker] = []
        self._turns = asyncio.Semaphore(WORKERS)

    async def check(self, text: str, own: str, vocab_size: int) -> str:
        """Return the grammar as the engine wants it.

        Args:
            text: in llguidance's variant of Lark
            own: a grammar that it calls `@own`; empty: none
            vocab_size: of the model

        Raises:
            UnfitGrammarError: it cannot be enforced.
            NoCompilerError: there is no process to check it now.
        """
        key = hashlib.blake2b(f"{text}\0{own}".encode(errors="replace"), digest_size=16).digest()
        verdict = self._verdicts.get(key)
        if verdict is None:
            async with self._turns:
                verdict = self._verdicts.get(key) or await self._ask(Candidate(text, own), vocab_size)
            self._verdicts[key] = verdict
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        if verdict.error:
            raise UnfitGrammarError(verdict.error)
        return verdict.text

    async def close(self) -> None:
        """End the workers."""
        while self._idle:
            await self._idle.pop().close()

    async def _ask(self, candidate: Candidate, vocab_size: int) -> GrammarVerdict:
        worker = self._idle.pop() if self._idle else await self._start(vocab_size)
        try:
            verdict = await worker.ask(candidate)
        except BaseException:  # its answer would be taken for the next grammar's
            worker.kill()
            raise
        if verdict is None:
            return GrammarVerdict("", await worker.why())
        self._idle.append(worker)
        return verdict

    async def _start(self, vocab_size: int) -> _Worker:
        vocabulary = await asyncio.to_thread(vocabulary_of, self._text)
        if vocabulary is None:
            raise UnfitGrammarError("this model's tokenizer has no token that ends an answer")
        worker = await _Worker.start()
        await worker.begin(Begin(vocabulary, vocab_size, CPU_SECONDS, MEMORY_BYTES))
        return worker


class _Worker:
    """A process that checks one grammar at a time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def start(cls) -> _Worker:
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "server.generation.grammar_worker",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip
        except OSError as error:
            raise NoCompilerError(
                f"the server's compiler of grammars cannot be started ({error.strerror}); try again later"
            ) from None
        return cls(process)

    async def begin(self, begin: Begin) -> None:
        """Send the vocabulary and wait until it is read.

        Raises:
            NoCompilerError: the process does not start.
        """
        if await self._exchange(begin) is None:
            self.kill()
            raise NoCompilerError("the server's compiler of grammars does not start; try again later")

    async def ask(self, candidate: Candidate) -> GrammarVerdict | None:
        """Return the verdict; None if the process has ended or takes too long."""
        return await self._exchange(candidate)

    async def why(self) -> str:
        """End the process, and say why it gave no verdict."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 0.5)
        code = self._process.returncode
        self.kill()
        if code in (None, -signal.SIGPROF):
            return f"it takes more than {CPU_SECONDS} s to compile; make it smaller"
        if code == -signal.SIGSEGV:
            return "it is nested too deeply"
        return f"it takes more than {MEMORY_BYTES >> 20} MiB of memory to compile; make it smaller"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def close(self) -> None:
        self.kill()
        await self._process.wait()

    async def _exchange(self, message: Begin | Candidate) -> GrammarVerdict | None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            async with asyncio.timeout(WALL_SECONDS):
                stdin.write(frame(msgspec.msgpack.encode(message)))
                await stdin.drain()
                size = int.from_bytes(await stdout.readexactly(_HEADER_BYTES), "big")
                return msgspec.msgpack.decode(await stdout.readexactly(size), type=GrammarVerdict)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            return None


def frame(message: bytes) -> bytes:
    """A message with its length before it."""
    return len(message).to_bytes(_HEADER_BYTES, "big") + message
