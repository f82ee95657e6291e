"""Steps that are launched ahead of the host say what steps one by one say. Kernels are interpreted."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.memory.planes import PagedCache
from engine.models.gqa.model import GqaModel
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.types import PENDING, SampleSpec, ScheduledRequest, StepPlan
from engine.protocol import Delta, Grammar, SamplingParams, Submit, Vocabulary
from engine.step.build import Built, build
from engine.step.core import EngineCore, StepRunner
from engine.step.grammars import Grammars
from engine.step.runner import Runner
from tests.engine.kit import VOCAB, base_of, random_overlay, tiny_checkpoint
from tests.interpreter import prepare

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
prepare()

from engine.models.gqa.device import DeviceStep  # noqa: E402 - needs Triton
from engine.step.device_runner import DeviceRunner  # noqa: E402

pytestmark = pytest.mark.interpreted

Asked = tuple[str, int, dict[str, Any]]  # name, tokens of the prompt, sampling

GREEDY: list[Asked] = [("a", 5, {}), ("sparse b", 40, {}), ("c", 66, {"max_tokens": 2})]
WISHES: list[Asked] = [
    ("a", 9, {"temperature": 0.9, "seed": 3}),
    ("sparse b", 41, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 4}),
    ("c", 12, {"frequency_penalty": 1.5, "repetition_penalty": 1.2}),
    ("d", 4, {"logprobs": 2, "logit_bias": ((7, 3.0),)}),
    ("sparse e", 35, {"prompt_logprobs": 1, "presence_penalty": 1.0, "temperature": 0.5, "seed": 9}),
]


class TorchStep:
    """A step over rows by torch's operations, which the interpreter does not slow down."""

    def __init__(self, built: Built) -> None:
        self._model, self._costs = built.runner._model, built.runner._costs
        self.drawn = torch.zeros(4, dtype=torch.int64)

    def forward(self, batch: Batch, cache: PagedCache, budget_bytes: int) -> Tensor:
        ids = batch.token_ids
        known = torch.where(ids < 0, self.drawn[(-1 - ids).clamp(min=0)], ids)
        return self._model.forward(replace(batch, token_ids=known), cache, self._costs)

    def hidden_like(self) -> Tensor:
        raise AssertionError("only graphs ask for it")

    def logits(self, hidden: Tensor) -> Tensor:
        return self._model.logits(hidden)


@dataclass(frozen=True)
class Pair:
    """One checkpoint, step by step and ahead of the host."""

    built: Built
    plain: Runner
    ahead: DeviceRunner
    kernels: DeviceRunner  # with a step in kernels


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder: Path = tmp_path_factory.mktemp("ahead")
    tiny_checkpoint(folder, num_hidden_layers=2)
    config = EngineConfig(
        weights=str(folder), overlay=str(random_overlay(folder / "indexer.safetensors", base_of(folder))),
        device="cpu", dtype="float32", kernels="torch", kv_cache_bytes=4 << 20,
    )  # fmt: skip
    plain, other, third = build(config), build(config), build(config)
    ahead = DeviceRunner(other.runner._model, TorchStep(other), other.cache, 1 << 20, torch.device("cpu"))
    model = third.runner._model
    assert isinstance(model, GqaModel)
    step = model.device_step = DeviceStep(model)
    step.reserve(4)
    kernels = DeviceRunner(model, step, third.cache, 1 << 20, torch.device("cpu"))
    return Pair(plain, plain.runner, ahead, kernels)


class Talk:
    """Requests through one loop."""

    def __init__(
        self,
        built: Built,
        runner: StepRunner,
        pages: int = 16,
        budget: int = 64,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        scheduler = Scheduler(
            pages, token_budget=budget, max_running=4, max_model_len=256, prefix_caching=True
        )
        grammars = None if vocabulary is None else Grammars(vocabulary, VOCAB)
        self.core = EngineCore(scheduler, runner, Meter(built.costs), sparse=True, grammars=grammars)
        self.deltas: dict[str, list[Delta]] = {}
        self.preemptions = 0

    def ask(self, asked: list[Asked], grammar: Grammar | None = None) -> Talk:
        """Submit requests; those with "grammar" in their name have one."""
        for name, length, wishes in asked:
            params = SamplingParams(**{"max_tokens": 6, "seed": 0, "temperature": 0.0, **wishes})
            prompt = tuple((7 * i + len(name) + ord(name[-1])) % VOCAB for i in range(length))
            top_k = 32 if name.startswith("sparse") else None
            self.deltas[name] = []
            own = grammar if "grammar" in name else None
            assert not self.core.submit(
                Submit(
                    request_id=name,
                    prompt_token_ids=prompt,
                    sampling=params,
                    index_top_k=top_k,
                    grammar=own,
                )
            )
        return self

    def finish(self, each: Callable[[], None] = lambda: None) -> Talk:
        while self.core.has_work:
            output = self.core.step()
            assert output is not None
            for delta in output.deltas:
                self.deltas[delta.request_id].append(delta)
            self.preemptions = self.core.stats().preemptions_total
            each()
        return self

    def said(self) -> dict[str, Any]:
        """Everything that clients see, but times and rounding."""
        return {
            name: (
                [token for delta in deltas for token in delta.token_ids],
                [[(e.token_id, e.rank, [t for t, _ in e.top]) for e in d.logprobs or ()] for d in deltas],
                [(e.token_id, e.rank) for d in deltas for e in d.prompt_logprobs or () if e],
                deltas[-1].finish_reason,
            )
            for name, deltas in self.deltas.items()
        }


@pytest.mark.parametrize("asked", [GREEDY, WISHES])
def test_what_is_said_is_the_same(pair: Pair, asked: list[Asked]) -> None:
    plain = Talk(pair.built, pair.plain).ask(asked).finish()
    ahead = Talk(pair.built, pair.ahead).ask(asked).finish()
    assert ahead.said() == plain.said()
    assert {reason for _, _, _, reason in ahead.said().values()} == {"length"}


@pytest.mark.parametrize("wishes", [{}, {"temperature": 0.8}, {"presence_penalty": 0.5, "logprobs": 1}])
def test_masked_draws_wait_for_the_tokens_before_them(pair: Pair, wishes: dict[str, Any]) -> None:
    """An answer with a grammar beside answers without one, whose steps are all launched ahead."""
    tokens = (*(bytes([n]) for n in range(32, 32 + VOCAB - 1)), b"")
    vocabulary = Vocabulary(tokens=tokens, special=(VOCAB - 1,), ends=(VOCAB - 1,))
    grammar = Grammar(text='%llguidance {"no_forcing": true}\nstart: /([a-d]{2}-[0-9]){2,4}/')
    asked: list[Asked] = [
        ("a", 5, {**wishes, "seed": 5}),
        ("grammar b", 40, {"max_tokens": 30, "stop_token_ids": (VOCAB - 1,), **wishes}),
        ("c", 12, {"max_tokens": 14}),
        ("grammar d", 9, {"max_tokens": 5}),
    ]
    said = []
    for runner in (pair.plain, pair.ahead):
        talk = Talk(pair.built, runner, vocabulary=vocabulary).ask(asked, grammar).finish()
        said.append(talk.said())
    assert said[1] == said[0]
    for name, wanted in (("grammar b", r"([a-d]{2}-\d){2,4}"), ("grammar d", r"[a-d]{2}-\d[a-d]")):
        own = said[1][name]
        assert re.fullmatch(wanted, b"".join(tokens[token] for token in own[0]).decode())
    assert said[1]["grammar b"][3] == "stop"
    free = [one for one in asked if "grammar" not in one[0]]
    alone = Talk(pair.built, pair.plain).ask(free).finish().said()
    assert alone == {name: said[1][name] for name, _, _ in free}


def test_nothing_is_launched_after_a_step_that_waits(pair: Pair) -> None:
    spec = SampleSpec(params=SamplingParams(max_tokens=1, seed=0), output_index=0, prompt_len=1, history=())
    row = ScheduledRequest(
        request_id="x", token_ids=(3,), start=0, page_ids=(0,), index_top_k=None, sample=spec
    )
    flight = pair.ahead.launch(StepPlan(requests=(row,)), hold=True)
    with pytest.raises(EngineError, match="waits for its masks"):
        pair.ahead.launch(StepPlan(requests=(row,)))
    flight.draw(None)
    assert len(flight.result().sampled[0].token_ids) == 1


def test_kernels_take_tokens_that_the_host_does_not_know(pair: Pair) -> None:
    asked: list[Asked] = [("a", 5, {"max_tokens": 3}), ("sparse b", 34, {"max_tokens": 3})]
    plain = Talk(pair.built, pair.plain).ask(asked).finish()
    assert Talk(pair.built, pair.kernels).ask(asked).finish().said() == plain.said()


def test_preemption_and_prefix_hits_change_nothing(pair: Pair) -> None:
    asked: list[Asked] = [
        ("a", 60, {"max_tokens": 12, "frequency_penalty": 0.7}),
        ("sparse b", 61, {"max_tokens": 12}),
        ("c", 62, {"max_tokens": 12, "temperature": 0.9}),
    ]
    free = Talk(pair.built, pair.plain).ask(asked).finish()
    tight = Talk(pair.built, pair.ahead, pages=4).ask(asked).finish()
    assert tight.preemptions > 0
    assert tight.said() == free.said()
    again = Talk(pair.built, pair.ahead).ask(asked).finish()
    said = again.said()
    assert again.ask(asked).finish().said() == said == free.said()
    usage = again.deltas["c"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 0  # 62 tokens fill no page
    longer: list[Asked] = [("a", 130, {})]
    first = Talk(pair.built, pair.ahead).ask(longer).finish()
    said = first.said()
    assert first.ask(longer).finish().said() == said
    usage = first.deltas["a"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 128


def test_a_stop_token_ends_a_request_whose_next_row_is_in_flight(pair: Pair) -> None:
    tokens = Talk(pair.built, pair.plain).ask(GREEDY).finish().said()["sparse b"][0]
    stop = next(token for token in tokens[1:] if token != tokens[0])
    asked = [("sparse b", 40, {"stop_token_ids": (stop,)})]
    talk = Talk(pair.built, pair.ahead).ask(asked).finish()
    assert talk.said()["sparse b"][0] == tokens[: tokens.index(stop) + 1]
    assert talk.said()["sparse b"][3] == "stop"
    stats = talk.core.stats()
    assert (stats.pages_used, stats.running) == (0, 0)
    usage = talk.deltas["sparse b"][-1].usage
    assert usage is not None
    assert usage.work.device_seconds == pytest.approx(stats.busy_seconds_total)


def test_an_abort_in_flight_ends_one_request_and_no_other(pair: Pair) -> None:
    alone = Talk(pair.built, pair.plain).ask([GREEDY[0]]).finish().said()["a"]
    talk = Talk(pair.built, pair.ahead).ask(GREEDY)
    for _ in range(3):
        output = talk.core.step()
        assert output is not None
        for delta in output.deltas:
            talk.deltas[delta.request_id].append(delta)
    (end,) = talk.core.abort("sparse b")
    assert end.finish_reason == "abort"
    assert talk.core.abort("sparse b") == ()
    talk.deltas["sparse b"].append(end)
    talk.finish()
    assert talk.said()["a"] == alone
    assert talk.core.stats().pages_used == 0


def test_what_a_device_cannot_do_is_refused(pair: Pair) -> None:
    row = ScheduledRequest(
        request_id="x", token_ids=(PENDING,), start=3, page_ids=(0,), index_top_k=None, sample=None
    )
    with pytest.raises(EngineError, match="'x' has a pending token that no step drew"):
        pair.ahead.launch(StepPlan(requests=(row,)))
