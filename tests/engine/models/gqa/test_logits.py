"""Whatever the scheduler does, each row's logits are those of the whole sequence computed at once.

Random traffic on a tiny random model: chunks of any size, batches of any mix, prefix hits, preemption.
The references are Hugging Face transformers (dense) and `plain_llama` (sparse).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from engine.checkpoint.safetensors import SafetensorsFile
from engine.protocol import Delta
from tests.engine.kit import VOCAB, Lab, Run, base_of, random_overlay, tiny_checkpoint
from tests.engine.models.gqa.plain import PlainLlama

TOLERANCE = 2e-5  # of the largest logit, float32
HEADS, DIM, ROPE = 3, 16, 8


class Tiny:
    def __init__(self, folder: Path) -> None:
        self.model: LlamaForCausalLM = tiny_checkpoint(folder)
        overlay = random_overlay(
            folder / "indexer.safetensors", base_of(folder), heads=HEADS, dim=DIM, rope=ROPE
        )
        self.auto = Lab(folder, overlay)
        self.gather = Lab(folder, overlay, sparse_form="gather", score_budget_bytes=40_000)
        self.mask = Lab(folder, overlay, sparse_form="mask", score_budget_bytes=40_000)
        file = SafetensorsFile(overlay)
        indexer = {name: file.read(name, torch.float32) for name in file.names()}
        self.plain = PlainLlama(self.model.state_dict(), self.model.config, indexer)

    def dense(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # which stream of random tokens: few, so that prefixes are shared
        st.one_of(st.sampled_from([1, 63, 64, 65, 128, 129]), st.integers(1, 300)),
        st.integers(1, 5),  # max_tokens
        st.sampled_from([None, 1000, 400]),  # dense, or an index_top_k beyond every context here
        st.integers(0, 6),  # steps before the next arrives
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=requests, budget=st.integers(8, 200), pages=st.integers(6, 24), caching=st.booleans())
def test_dense_logits_equal_transformers_under_any_schedule(
    tiny: Tiny, requests: list[tuple[int, int, int, int | None, int]], budget: int, pages: int, caching: bool
) -> None:
    run = tiny.auto.run(pages=pages, budget=budget, running=8, caching=caching)
    for number, (stream, length, max_tokens, index_top_k, pause) in enumerate(requests):
        run.submit(str(number), tokens_of(stream, length), max_tokens, index_top_k)
        for _ in range(pause):
            if run.core.has_work:
                run.step()
    run.finish()
    for number, (_, length, max_tokens, _, _) in enumerate(requests):
        name = str(number)
        assert run.ends[name].finish_reason == "length"
        assert len(run.tokens[name]) == length + max_tokens
        assert run.error(name, tiny.dense(run.tokens[name])) < TOLERANCE


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("budget", [1, 7, 64, 512])
def test_chunked_or_not(tiny: Tiny, length: int, budget: int) -> None:
    run = tiny.auto.run(budget=budget, running=1)
    run.submit("a", tokens_of(9, length), 3)
    run.finish()
    assert run.error("a", tiny.dense(run.tokens["a"])) < TOLERANCE


def test_a_prefix_hit_gives_the_same_logits_as_a_cold_start(tiny: Tiny) -> None:
    run = tiny.auto.run()
    prompt = tokens_of(5, 200)
    run.submit("cold", prompt)
    run.finish()
    run.submit("warm", prompt)
    run.finish()
    usage = run.ends["warm"].usage
    assert usage is not None
    assert usage.cached_tokens == 192
    assert min(run.rows["warm"]) == 192  # the hit was used: nothing before it was computed
    assert run.error("warm", tiny.dense(run.tokens["warm"])) < TOLERANCE


def test_preemption_gives_the_same_logits_and_the_same_text(tiny: Tiny) -> None:
    calm, tight = tiny.auto.run(), tiny.auto.run(pages=7)
    for run in (calm, tight):
        for name in "abc":
            run.submit(name, tokens_of(ord(name), 100), 60, None, temperature=0.9, seed=ord(name))
        run.finish()
    assert tight.core.stats().preemptions_total > 0
    assert calm.core.stats().preemptions_total == 0
    for name in "abc":
        assert tight.tokens[name] == calm.tokens[name]
        assert tight.error(name, tiny.dense(tight.tokens[name])) < TOLERANCE


def test_index_keys_are_written_while_attention_is_still_dense(tiny: Tiny) -> None:
    """A dense request fills the cache; a sparse one that reuses its first pages must find their index keys."""
    run = tiny.auto.run()
    prompt = tokens_of(6, 180)
    run.submit("dense", prompt[:100])
    run.finish()
    run.submit("sparse", prompt, 3, index_top_k=64)
    run.finish()
    usage = run.ends["sparse"].usage
    assert usage is not None
    assert usage.cached_tokens == 64  # only the page that index_top_k = 64 covers is the same in both
    check_sparse(tiny, run, "sparse", 64)


sparse_requests = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.integers(60, 230),
        st.integers(1, 4),
        st.sampled_from([16, 64, 100]),
        st.integers(0, 4),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=sparse_requests,
    budget=st.integers(8, 200),
    pages=st.integers(5, 16),
    form=st.sampled_from(["auto", "gather", "mask"]),
)
def test_sparse_logits_equal_masked_attention_over_the_same_sets_under_any_schedule(
    tiny: Tiny, requests: list[tuple[int, int, int, int, int]], budget: int, pages: int, form: str
) -> None:
    """Rows of different index_top_k in one batch, each with the best-scored tokens of its own context."""
    run: Run = getattr(tiny, form).run(pages=pages, budget=budget, running=8)
    for number, (stream, length, max_tokens, index_top_k, pause) in enumerate(requests):
        run.submit(str(number), tokens_of(stream, length), max_tokens, index_top_k)
        for _ in range(pause):
            if run.core.has_work:
                run.step()
    run.finish()
    for number, (_, _, _, index_top_k, _) in enumerate(requests):
        check_sparse(tiny, run, str(number), index_top_k)


def check_sparse(tiny: Tiny, run: Run, name: str, index_top_k: int) -> None:
    """The sets are the best by the reference's own scores, and the logits are those of attention over them."""
    given_sets = run.masks(name, index_top_k, layers=3)
    reference, masks, scores = tiny.plain.forward(
        run.tokens[name], index_top_k, HEADS, ROPE, given=given_sets
    )
    for mask, score in zip(masks, scores, strict=True):
        for position in range(len(mask) - 1):
            chosen, passed = score[position, mask[position]], score[position, ~mask[position]]
            assert len(chosen) == min(index_top_k, position + 1)
            assert chosen.min() >= passed.max() - 1e-4  # rounding may swap two that are equal to 4 digits
    for rows in run.rows[name].values():
        del rows[:-1]  # sets are of the last computation; a recomputed row may have swapped such a pair
    assert run.error(name, reference) < TOLERANCE


def test_sparse_is_not_dense(tiny: Tiny) -> None:
    """The comparison above can fail: with another selection the logits are far off."""
    run = tiny.auto.run()
    run.submit("a", tokens_of(1, 200), 2, index_top_k=16)
    run.finish()
    assert run.error("a", tiny.dense(run.tokens["a"])) > 0.05


def test_the_plain_reference_is_the_model(tiny: Tiny) -> None:
    tokens = tokens_of(3, 120)
    logits, _, _ = tiny.plain.forward(tokens, 1000, HEADS, ROPE)
    torch.testing.assert_close(logits.float(), tiny.dense(tokens), rtol=1e-4, atol=1e-4)


def test_prompt_logprobs_are_those_of_transformers(tiny: Tiny) -> None:
    run = tiny.auto.run(budget=50, running=4)
    prompt = tokens_of(2, 130)
    deltas: list[Delta] = []
    run.submit("a", prompt, 2, None, prompt_logprobs=1, logprobs=0)
    while run.core.has_work:
        output = run.core.step()
        assert output is not None
        deltas.extend(output.deltas)
    reported = deltas[0].prompt_logprobs
    assert reported is not None
    assert reported[0] is None
    expected = tiny.dense(prompt).log_softmax(-1)
    for position, entry in enumerate(reported[1:]):
        assert entry is not None
        assert entry.token_id == prompt[position + 1]
        assert abs(entry.logprob - float(expected[position, entry.token_id])) < 1e-4
        assert entry.top[0][0] == int(expected[position].argmax())


def test_a_model_without_an_indexer_runs_dense_and_says_so(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path, tie_word_embeddings=True, seed=4)
    run = Lab(tmp_path).run()
    run.submit("a", tokens_of(1, 150), 3, index_top_k=16)
    run.finish()
    usage = run.ends["a"].usage
    assert usage is not None
    assert usage.index_top_k is None
    with torch.no_grad():
        assert run.error("a", model(torch.tensor([run.tokens["a"]])).logits[0]) < TOLERANCE
