"""Grammars are compiled in processes with limits: what takes too much costs its sender only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
import pytest_asyncio

from server.chat.grammar import BEGIN, json_value
from server.generation import grammars
from server.generation.grammars import GrammarChecks, UnfitGrammarError, vocabulary_of
from tests.server.kit import BOS, EOS, TEXT

SIZE = TEXT.vocab_size


@pytest_asyncio.fixture
async def checks() -> AsyncGenerator[GrammarChecks, None]:
    made = GrammarChecks(TEXT)
    yield made
    await made.close()


def test_a_vocabulary_is_bytes_and_control_tokens_apart() -> None:
    vocabulary = vocabulary_of(TEXT)
    assert vocabulary is not None
    assert len(vocabulary.tokens) == SIZE
    assert vocabulary.tokens[TEXT.encode("a", add_bos=False)[0]] == b"a"
    assert vocabulary.ends == (EOS,)
    assert {BOS, EOS} <= set(vocabulary.special)


@pytest.mark.process
async def test_good_and_bad_grammars(checks: GrammarChecks) -> None:
    good = BEGIN + "start: " + json_value({"type": "object"})
    assert await checks.check(good, "", SIZE) == good
    with pytest.raises(UnfitGrammarError, match="unknown name"):
        await checks.check("start: foo", "", SIZE)
    own = await checks.check(BEGIN + "start: @own", 'root ::= "a" [b-d]+', SIZE)
    assert '"name": "own"' in own
    with pytest.raises(UnfitGrammarError, match="neither GBNF nor Lark"):
        await checks.check(BEGIN + "start: @own", 'root ::= "a', SIZE)
    assert len(checks._idle) == 1


@pytest.mark.process
async def test_what_takes_too_much_costs_its_sender_only(
    checks: GrammarChecks, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = BEGIN + "start: " + " | ".join(f'"{number}x"' for number in range(120_000))
    began = asyncio.get_running_loop().time()
    with pytest.raises(UnfitGrammarError, match="takes more than 1 s to compile"):
        await checks.check(slow, "", SIZE)
    with pytest.raises(UnfitGrammarError, match="takes more than 1 s"):  # remembered
        await checks.check(slow, "", SIZE)
    assert asyncio.get_running_loop().time() - began < grammars.WALL_SECONDS
    rules = "\n".join(f'r{i}: "a{i}" r{i + 1} | r{i + 1} r{i + 1}' for i in range(20_000))
    with pytest.raises(UnfitGrammarError, match="nested too deeply|MiB of memory|more than 1 s"):
        await checks.check(f'{BEGIN}start: r0\n{rules}\nr20000: "z"\n', "", SIZE)
    good = BEGIN + 'start: "a"'
    assert await checks.check(good, "", SIZE) == good
    await checks.close()
    monkeypatch.setattr(grammars, "MEMORY_BYTES", 20 << 20)
    with pytest.raises(UnfitGrammarError, match="20 MiB of memory|too large"):
        await checks.check(slow + ' | "y"', "", SIZE)


@pytest.mark.process
async def test_a_request_that_is_cancelled_leaves_no_answer_behind(checks: GrammarChecks) -> None:
    assert await checks.check(BEGIN + 'start: "a"', "", SIZE)
    slow = BEGIN + "start: " + " | ".join(f'"{number}z"' for number in range(60_000))
    task = asyncio.create_task(checks.check(slow, "", SIZE))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not checks._idle
    other = BEGIN + 'start: "b"'
    assert await checks.check(other, "", SIZE) == other
