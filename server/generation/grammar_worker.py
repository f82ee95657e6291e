"""A process that compiles grammars under limits, for `server.generation.grammars`.

It reads `Begin`, then `Candidate`s, from its standard input, and answers each with a `GrammarVerdict`. Whatever takes too much processor
time or memory ends the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from engine.errors import GrammarError
from engine.grammar import GrammarCompiler
from server.generation.grammars import Begin, Candidate, GrammarVerdict, frame

T = TypeVar("T")


def main() -> None:
    """Serve until the standard input ends."""
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    begin = _read(stdin, Begin)
    if begin is None:
        return
    compiler = GrammarCompiler(begin.vocabulary, begin.vocab_size)
    _limit_memory(begin.memory_bytes)
    _write(stdout, GrammarVerdict(""))
    while (candidate := _read(stdin, Candidate)) is not None:
        signal.setitimer(signal.ITIMER_PROF, begin.cpu_seconds)  # its signal ends the process
        verdict = judge(compiler, candidate)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(stdout, verdict)


def judge(compiler: GrammarCompiler, candidate: Candidate) -> GrammarVerdict:
    """Compile a grammar, and compute its first mask, which is the slowest."""
    text = candidate.text
    try:
        if candidate.own:
            text = _joined(text, candidate.own)
        compiler.compile(text).mask()
    except GrammarError as error:
        return GrammarVerdict("", str(error))
    return GrammarVerdict(text)


def _joined(text: str, own: str) -> str:
    """One grammar of two, of which the first calls the second `@own`."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        own = any_to_lark(own)
    except Exception as error:  # the converter is a parser without a type of error of its own
        raise GrammarError(f"it is neither GBNF nor Lark: {error}") from None
    grammars = [{"name": "answer", "lark_grammar": text}, {"name": "own", "lark_grammar": own}]
    return json.dumps({"grammars": grammars})


def _limit_memory(more: int) -> None:
    """Let the process's address space grow by no more than so many bytes."""
    sizes = Path("/proc/self/statm")
    if sizes.is_file():  # Linux
        limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read(stream: BinaryIO, kind: type[T]) -> T | None:
    header = stream.read(4)
    if len(header) < 4:
        return None
    return msgspec.msgpack.decode(stream.read(int.from_bytes(header, "big")), type=kind)


def _write(stream: BinaryIO, verdict: GrammarVerdict) -> None:
    stream.write(frame(msgspec.msgpack.encode(verdict)))
    stream.flush()


if __name__ == "__main__":
    main()
