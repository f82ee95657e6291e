"""From prompt ids to text, without HTTP."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import EngineDiedError, EngineUnavailableError
from engine.protocol import Delta, Submit, TokenLogprob
from server.generation.choice import Choice, Job, TextDelta
from server.generation.generate import Generation, GenerationAbortedError, GenerationFailedError, QuietError
from tests.server.fake_engine import FakeEngine, Script
from tests.server.kit import EOS, TEXT, ids, say, submit


async def run(engine: FakeEngine, job: Job) -> list[TextDelta]:
    deltas: list[TextDelta] = []
    async with Generation(engine, TEXT, [job]) as generation:
        generation.listen(deltas.append)
        await generation.over()
    return deltas


@given(
    text=st.text(max_size=30),
    group=st.integers(1, 7),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=3),
    limit=st.integers(1, 60),
)
@settings(max_examples=150, deadline=None)
def test_text_tokens_and_usage_agree(text: str, group: int, stop: list[str], limit: int) -> None:
    engine = FakeEngine(lambda submit: say(text, group=group))
    request = submit(max_tokens=limit, logprobs=0)
    deltas = asyncio.run(run(engine, Job(0, request, tuple(stop))))
    *before, last = deltas
    assert all(delta.finish_reason is None and delta.usage is None for delta in before)
    assert last.usage is not None
    whole = TEXT.decode(ids(text)[:limit])
    given_out = "".join(delta.text for delta in deltas)
    assert whole.startswith(given_out)
    tokens = [token_id for delta in deltas for token_id in delta.token_ids]
    assert [entry.token_id for delta in deltas for entry in delta.logprobs or ()] == tokens
    met = [s for s in stop if s in whole]
    if met:
        assert last.finish_reason == "stop"
        assert not any(s in given_out for s in stop)
        assert last.usage.completion_tokens == len(tokens)
    else:
        assert given_out == whole
        assert last.finish_reason == ("stop" if len(ids(text)) < limit else "length")
        assert last.usage.completion_tokens == min(len(ids(text)) + 1, limit)
        assert EOS not in tokens
    assert len(engine.aborted) + len(engine.finished) == 1


async def test_an_early_stop_aborts_and_counts_what_was_read() -> None:
    engine = FakeEngine(lambda submit: say("abcdef", group=4, cached=2))
    (delta,) = await run(engine, Job(0, submit(), ("b",)))
    assert (delta.text, delta.finish_reason, delta.token_ids) == ("a", "stop", tuple(ids("ab")))
    assert delta.usage is not None
    assert (delta.usage.prompt_tokens, delta.usage.completion_tokens) == (2, 2)
    assert delta.usage.cached_tokens == 2  # known since the first token
    assert engine.aborted == ["r"]


async def test_a_stop_string_in_the_last_delta_keeps_the_engines_usage() -> None:
    engine = FakeEngine(lambda submit: say("ab", group=4, cached=2))
    (delta,) = await run(engine, Job(0, submit(), ("b",)))
    assert delta.usage is not None
    assert (delta.usage.cached_tokens, delta.usage.completion_tokens) == (2, 2)
    assert engine.finished == ["r"]


async def test_the_text_of_a_stop_token_is_left_out() -> None:
    engine = FakeEngine(lambda submit: say("abc"))
    deltas = await run(engine, Job(0, submit(stop_token_ids=(*ids("b"),), logprobs=0)))
    assert "".join(delta.text for delta in deltas) == "a"
    assert (deltas[-1].token_ids, deltas[-1].logprobs) == ((), ())


async def test_prompt_only() -> None:
    engine = FakeEngine(lambda submit: say("abc"))
    request = submit((1, 2, 3), max_tokens=1, prompt_logprobs=0)
    (delta,) = await run(engine, Job(0, request, (), prompt_only=True))
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("", (), "length")
    assert len(delta.prompt_logprobs or ()) == 3


@pytest.mark.parametrize(
    ("fault", "error"),
    [("die", EngineDiedError), ("error", GenerationFailedError), ("abort", GenerationAbortedError)],
)
async def test_faults(fault: str, error: type[Exception]) -> None:
    engine = FakeEngine(lambda submit: say("abc", fault=fault, fault_after=1))
    with pytest.raises(error):
        await run(engine, Job(0, submit()))


def jobs(count: int) -> list[Job]:
    return [Job(i, msgspec.structs.replace(submit(), request_id=str(i))) for i in range(count)]


async def test_choices_run_side_by_side() -> None:
    engine = FakeEngine(lambda submit: say("abc", delay=0.01))
    seen: list[TextDelta] = []
    async with Generation(engine, TEXT, jobs(3)) as generation:
        generation.listen(seen.append)
        await generation.over()
        await generation.over()
    assert [delta.index for delta in seen[:3]] == [0, 1, 2]
    assert sum(delta.finish_reason is not None for delta in seen) == 3


async def test_leaving_aborts_what_still_runs() -> None:
    engine = FakeEngine(lambda submit: say("a", first_delay=0.0 if submit.request_id == "0" else 60.0))
    async with Generation(engine, TEXT, jobs(3)) as generation:
        with pytest.raises(QuietError):
            await generation.over(0.05)
    assert (engine.finished, sorted(engine.aborted)) == (["0"], ["1", "2"])


async def test_one_failing_choice_ends_all() -> None:
    def script(request: Submit) -> Script:
        return say("a" * 50, fault="error") if request.request_id == "1" else say("a", first_delay=60.0)

    engine = FakeEngine(script)
    seen: list[TextDelta] = []
    async with Generation(engine, TEXT, jobs(3)) as generation:
        generation.listen(seen.append)
        with pytest.raises(GenerationFailedError, match="NaN"):
            await generation.over()
        assert sorted(engine.aborted) == ["0", "2"]  # before the block is left
        assert seen == []


async def test_a_refusal_settles_every_choice_and_sends_none_of_the_rest() -> None:
    engine = FakeEngine(
        lambda submit: say("a", fault="refuse" if submit.request_id == "1" else None, delay=9.0)
    )
    settled: list[str] = []
    async with Generation(engine, TEXT, jobs(3), lambda name, usage: settled.append(name)) as generation:
        with pytest.raises(EngineUnavailableError):
            await generation.settle(5.0)
    await asyncio.sleep(0.01)
    assert sorted(settled) == ["0", "1", "2"]
    assert [request.request_id for request in engine.submitted] == ["0"]


async def test_an_error_of_the_listener_ends_its_generation_only() -> None:
    def fail(delta: TextDelta) -> None:
        raise ValueError("a fault of the renderer")

    engine = FakeEngine(lambda submit: say("abc", delay=0.001))
    other: list[TextDelta] = []
    async with (
        Generation(engine, TEXT, jobs(2)) as generation,
        Generation(engine, TEXT, [Job(0, msgspec.structs.replace(submit(), request_id="other"))]) as calm,
    ):
        generation.listen(fail)
        calm.listen(other.append)
        with pytest.raises(ValueError, match="renderer"):
            await generation.over()
        await calm.over()
    assert "".join(delta.text for delta in other) == "abc"
    assert sorted(engine.aborted) == ["0", "1"]


async def test_settling_loses_nothing() -> None:
    engine = FakeEngine(lambda submit: say("ab"))
    seen: list[TextDelta] = []
    async with Generation(engine, TEXT, jobs(1)) as generation:
        await generation.settle(5.0)
        await asyncio.sleep(0.01)
        generation.listen(seen.append)
        await generation.over()
    assert "".join(delta.text for delta in seen) == "ab"


@given(text=st.text('aé中👩\u200d"\n', max_size=20), cut=st.integers(0, 3), group=st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_the_short_way_of_plain_text_gives_what_the_long_way_gives(text: str, cut: int, group: int) -> None:
    token_ids = tuple(ids(text))[cut:]  # may begin within a character
    short, long = Choice(TEXT, Job(0, submit())), Choice(TEXT, Job(0, submit()))
    long._endless = False
    entries = tuple(TokenLogprob(token_id=i, logprob=-1.0, rank=1, top=()) for i in token_ids)
    for start in range(0, len(token_ids), group):
        delta = Delta(
            request_id="r",
            token_ids=token_ids[start : start + group],
            logprobs=entries[start : start + group] if cut else None,
            finish_reason="length" if start + group >= len(token_ids) else None,
        )
        assert short.read(delta) == long.read(delta)
