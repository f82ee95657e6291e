"""Answers under a grammar: every finished one is what the grammar says, and no other request notices."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.errors import GrammarError
from engine.grammar import MaskWords, Matcher
from engine.plan.types import SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import Delta, Grammar, SamplingParams, Submit
from engine.step import masking
from engine.step.grammars import KEPT, Compiled, Grammars
from engine.step.masking import Masking
from tests.engine.grammars import CALL, END, FREE, SIZE, THOUGHT, VOCABULARY, schema_grammar, text_of
from tests.engine.kit import Lab, Run, tiny_checkpoint
from tests.schemas import random_schema

BIAS = tuple((token_id, 4.0) for token_id in (*b'"}]', END))
"""A random model seldom ends a text by itself."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder: Path = tmp_path_factory.mktemp("masked")
    tiny_checkpoint(folder, vocab_size=SIZE, num_hidden_layers=2, max_position_embeddings=2048)
    return Lab(folder)


def run_of(lab: Lab, *, late_masks: bool = False, **settings: Any) -> Run:
    run = lab.run(**settings)
    run.core._grammars = Grammars(VOCABULARY, SIZE)
    run.core._late_masks = late_masks
    return run


def ask(
    run: Run, name: str, grammar: Grammar | None, prompt: Sequence[int] = (1, 2, 3), **wishes: Any
) -> None:
    params: dict[str, Any] = {
        "max_tokens": 300, "seed": 1, "temperature": 1.0, "stop_token_ids": (END,), "logit_bias": BIAS, **wishes
    }  # fmt: skip
    run.tokens[name] = list(prompt)
    run.take(
        run.core.submit(
            Submit(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                sampling=SamplingParams(**params),
                index_top_k=None,
                grammar=grammar,
            )
        )
    )


def said(run: Run, name: str, prompt: Sequence[int] = (1, 2, 3)) -> str:
    return text_of(run.tokens[name][len(prompt) :])


def test_every_finished_answer_to_500_schemas_validates(lab: Lab) -> None:
    """In batches that come and go, greedy and not, filtered, penalised; beside requests without a grammar."""
    run = run_of(lab, budget=64, running=12)
    schemas = {str(seed): random_schema(seed) for seed in range(500)}
    for number, (name, schema) in enumerate(schemas.items()):
        wishes: dict[str, Any] = [
            {},
            {"temperature": 0.0},
            {"top_k": 20, "top_p": 0.9},
            {"frequency_penalty": 0.5, "logprobs": 1},
        ][number % 4]
        ask(run, name, schema_grammar(schema), seed=number, **wishes)
        if number % 10 == 0:
            ask(run, f"free {number}", None, max_tokens=20)
        for _ in range(2):
            run.step()
    run.finish()
    finished = 0
    for name, schema in schemas.items():
        end = run.ends[name]
        assert end.finish_reason in ("stop", "length"), end.error
        if end.finish_reason == "stop":
            finished += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(said(run, name)))
    assert finished >= 450
    assert not run.core._masking


def test_other_requests_say_what_they_say_alone(lab: Lab) -> None:
    alone, beside = run_of(lab), run_of(lab)
    for run in (alone, beside):
        ask(run, "greedy", None, temperature=0.0, max_tokens=30)
        ask(run, "drawn", None, max_tokens=30, logprobs=2)
    for n in range(4):
        ask(beside, str(n), schema_grammar(random_schema(n)))
    for run in (alone, beside):
        run.finish()
    assert {name: beside.tokens[name] for name in ("greedy", "drawn")} == alone.tokens


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        (FREE + "start: /[a-f]{2,5}-[0-9]{3}/", r"[a-f]{2,5}-[0-9]{3}"),
        (FREE + 'start: "yes" | "no" | "viel\\u00e4cht"', "yes|no|vielächt"),
        (FREE + 'start: sum\nsum: num ("+" num)*\nnum: /[0-9]{1,2}/', r"\d{1,2}(\+\d{1,2})*"),
    ],
)
def test_other_grammars(lab: Lab, grammar: str, wanted: str) -> None:
    run = run_of(lab)
    for seed in range(6):
        ask(run, str(seed), Grammar(text=grammar), seed=seed, max_tokens=60)
    run.finish()
    for name in run.tokens:
        if run.ends[name].finish_reason == "stop":
            assert re.fullmatch(wanted, said(run, name))
    assert any(end.finish_reason == "stop" for end in run.ends.values())


def test_an_answer_at_its_limit_says_that_it_is_cut(lab: Lab) -> None:
    run = run_of(lab)
    ask(run, "a", schema_grammar({"type": "string", "minLength": 50}), max_tokens=10)
    run.finish()
    assert run.ends["a"].finish_reason == "length"
    assert said(run, "a").startswith('"')


def test_the_grammar_begins_after_the_reasoning(lab: Lab) -> None:
    run = run_of(lab)
    for seed in range(4):
        bias = (*BIAS, (THOUGHT, 6.0))
        ask(run, str(seed), schema_grammar({"enum": ["x"]}, after=(THOUGHT,)), seed=seed, logit_bias=bias)
    run.finish()
    for name, end in run.ends.items():
        if end.finish_reason == "stop" and THOUGHT in (tokens := run.tokens[name][3:]):
            assert text_of(tokens[tokens.index(THOUGHT) + 1 :]) == '"x"'
    assert any(THOUGHT in tokens for tokens in run.tokens.values())


def test_few_pages_many_chunks_and_a_full_prefix_cache_change_nothing(lab: Lab) -> None:
    prompt = [n % 90 + 1 for n in range(150)]
    plain = run_of(lab)
    tight = run_of(lab, pages=7, budget=20, running=6)
    schema = {"type": "array", "items": {"enum": [True, "true", {"k": True}]}, "minItems": 12, "maxItems": 30}
    for run in (plain, tight):
        for n in range(6):
            ask(run, str(n), schema_grammar(schema), prompt, seed=n, max_tokens=200)
        run.finish()
    assert tight.core.stats().preemptions_total > 0
    assert tight.tokens == plain.tokens


def test_speculation_says_the_same(lab: Lab) -> None:
    plain, fast = run_of(lab), run_of(lab, draft_tokens=4, lookup=True)
    prompt = list(b'{"k": [true, true, true], "k": [true, true, true]} ' * 2)
    schema = {"type": "array", "items": {"enum": [True, "true", {"k": True}]}, "minItems": 12, "maxItems": 30}
    for run in (plain, fast):
        for n in range(6):
            ask(run, str(n), schema_grammar(schema), prompt, seed=n, temperature=[0.0, 0.7][n % 2])
        ask(
            run, "later", schema_grammar(schema, after=(THOUGHT,)), [*prompt, THOUGHT, *prompt], max_tokens=60
        )
        run.finish()
    assert fast.tokens == plain.tokens
    assert sum(fast.core.stats().draft_lengths_total[1:]) > 0, "some drafts were right"


def test_a_grammar_that_does_not_compile_ends_its_request_only(lab: Lab) -> None:
    run = run_of(lab)
    ask(run, "bad", Grammar(text="start: foo"))
    ask(run, "good", schema_grammar({"enum": [1]}))
    run.finish()
    assert run.ends["bad"].finish_reason == "error"
    assert 'unknown name: "foo"' in str(run.ends["bad"].error)
    assert said(run, "good") == "1"


def test_an_engine_without_a_vocabulary_refuses_grammars(lab: Lab) -> None:
    run = lab.run()
    ask(run, "a", schema_grammar({}))
    assert run.ends["a"].finish_reason == "error"


def test_grammars_are_compiled_on_a_thread_once_and_may_be_aborted(lab: Lab) -> None:
    run = run_of(lab)
    made: list[Compiled] = []
    arrived = threading.Event()

    def then(one: Compiled) -> None:
        made.append(one)
        arrived.set()

    run.core.compile_apart(then)
    grammar = schema_grammar({"enum": [7]})
    ask(run, "a", grammar)
    ask(run, "b", grammar)
    (end,) = run.core.abort("b")
    assert end.finish_reason == "abort"
    assert not run.core.has_work
    while len(made) < 2:
        assert arrived.wait(20)
        arrived.clear()
    for one in made:
        run.take(run.core.compiled(one))
    run.finish()
    assert said(run, "a") == "7"
    assert "b" not in run.ends
    ask(run, "c", grammar)
    assert run.core.has_work, "it is kept"
    run.finish()
    assert said(run, "c") == "7"
    ask(run, "d", schema_grammar({"enum": [8]}))
    assert [end.finish_reason for end in run.core.abort_all()] == ["abort"]


def test_few_compiled_grammars_are_kept() -> None:
    grammars = Grammars(VOCABULARY, SIZE)
    params = SamplingParams(max_tokens=1, seed=0)
    for n in range(KEPT + 2):
        grammar = Grammar(text=f'{FREE}start: "{n}"')
        submit = Submit(
            request_id="r", prompt_token_ids=(1,), sampling=params, index_top_k=None, grammar=grammar
        )
        assert grammars.compile(submit).matcher is not None
        assert grammars.kept(f'{FREE}start: "0"') is not None, "used again and again"
    assert grammars.kept(f'{FREE}start: "1"') is None
    assert grammars.kept(f'{FREE}start: "2"') is None
    assert grammars.kept(f'{FREE}start: "3"') is not None


class Slow(Matcher):
    """A matcher whose masks take long, in sleep or in work."""

    def __init__(self, sleep: float = 0.0, work: float = 0.0) -> None:
        self.sleep, self.work, self.asked = sleep, work, 0

    def allows(self, token_id: int) -> bool:
        return False

    def ahead(self, token_ids: Sequence[int]) -> list[MaskWords]:
        self.asked += 1
        time.sleep(self.sleep)
        end = time.thread_time() + self.work
        while time.thread_time() < end:
            pass
        return []


def plan_of(*names: str) -> StepPlan:
    spec = SampleSpec(params=SamplingParams(max_tokens=9, seed=0), output_index=0, prompt_len=1, history=())
    return StepPlan(
        requests=tuple(
            ScheduledRequest(
                request_id=name, token_ids=(1,), start=0, page_ids=(0,), index_top_k=None, sample=spec
            )
            for name in names
        )
    )


def test_a_mask_that_is_late_fails_its_request_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "DEADLINE_SECONDS", 1.0)
    grammar = Grammar(text="")
    live = Masking()
    names = [f"r{n}" for n in range(12)]
    for name in names:
        live.open(name, grammar, Slow(sleep=4.0 if name == "r3" else 0.0))
    began = time.monotonic()
    _, failed = live.masks(plan_of(*names, "free"))
    assert set(failed) == {"r3"}
    assert "takes too long" in failed["r3"]
    assert time.monotonic() - began < 3.5
    live.accept([Delta(request_id="r3", finish_reason="error")])
    _, failed = live.masks(plan_of(*(name for name in names if name != "r3")))
    assert not failed


def test_a_request_whose_masks_are_always_slow_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "SPARE_SECONDS", 0.02)
    live = Masking()
    live.open("slow", Grammar(text=""), Slow(work=0.03))
    failed: dict[str, str] = {}
    for _ in range(5):
        _, failed = live.masks(plan_of("slow"))
        if failed:
            break
    assert "too long" in failed["slow"]


def test_a_token_that_its_grammar_does_not_allow_is_an_error() -> None:
    grammars = Grammars(VOCABULARY, SIZE)
    submit = Submit(
        request_id="a",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1, seed=0),
        index_top_k=None,
        grammar=schema_grammar({"enum": [1]}),
    )
    matcher = grammars.compile(submit).matcher
    assert matcher is not None
    with pytest.raises(GrammarError):
        matcher.consume(CALL)
