"""The model asked in this process says what the model written out says, dense and sparse, in any groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.checkpoint.overlay import indexer_shapes, read_overlay
from engine.checkpoint.source import open_source
from engine.config import PAGE_SIZE
from engine.errors import ConfigError
from lab.distill.sparse_forward import by_student, losses
from lab.distill.student import Student
from lab.probe import MOST_ROWS, Probe, sampled
from tests.engine.kit import VOCAB, random_overlay
from tests.lab.distill.kit import CPU, Bench, one_thread

K = 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Bench, Path, Probe]]:
    with one_thread():
        folder = tmp_path_factory.mktemp("model")
        bench = Bench(folder)
        overlay = random_overlay(tmp_path_factory.mktemp("overlay") / "it.safetensors", bench.source, rank=0)
        yield bench, overlay, Probe(folder, overlay, device="cpu", dtype="float32", kv_cache_bytes=8 << 20)


def tokens_of(seed: int, count: int) -> list[int]:
    found: list[int] = torch.randint(
        3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


def test_dense_distributions_and_answers_are_the_models(made: tuple[Bench, Path, Probe]) -> None:
    bench, _, probe = made
    probe.chunk = 37
    prompts = [tokens_of(0, 90), tokens_of(1, 41), tokens_of(2, 1)]
    slots = probe.read(prompts, 12, None)
    replies = probe.answer(slots, 12, frozenset())
    for prompt, slot, reply in zip(prompts, slots, replies, strict=True):
        assert (len(reply.token_ids), reply.end) == (12, None)
        with torch.no_grad():
            whole = bench.model(torch.tensor([[*prompt, *reply.token_ids]])).logits[0].log_softmax(-1)
        expected = whole[len(prompt) - 1 : -1]
        assert tuple(expected.argmax(-1).tolist()) == reply.token_ids
        torch.testing.assert_close(probe.forced(slot, reply.token_ids), expected, atol=2e-4, rtol=1e-4)


def test_an_answer_ends_at_an_end_token_and_the_others_go_on(made: tuple[Bench, Path, Probe]) -> None:
    _, _, probe = made
    prompts = [tokens_of(3, 50), tokens_of(4, 60)]
    free = probe.answer(probe.read(prompts, 8, None), 8, frozenset())
    end = next(t for t in free[0].token_ids[2:] if t not in free[1].token_ids)
    first, second = probe.answer(probe.read(prompts, 8, None), 8, frozenset({end}))
    at = free[0].token_ids.index(end)
    assert (first.token_ids, first.end) == (free[0].token_ids[:at], end)
    assert second == free[1]


def test_sparse_losses_are_the_trainers(made: tuple[Bench, Path, Probe]) -> None:
    bench, path, probe = made
    source = open_source(bench.folder)
    overlay = read_overlay(path, source)
    config = bench.trunk.config
    student = Student(config, overlay.info, config.max_positions, CPU, 0)
    names = indexer_shapes(overlay.info, config.num_layers, config.hidden_size)
    student.load({name: overlay.tensors.read(name, torch.float32) for name in names})
    ids = tokens_of(5, 100)
    expected = losses(bench.trunk, torch.tensor(ids), by_student(student, K))
    torch.testing.assert_close(probe.losses(ids, K), expected, atol=2e-4, rtol=1e-4)
    slot = probe.read([ids[:60]], 40, K)[0]
    rows = probe.forced(slot, ids[60:])
    own = -rows.gather(-1, torch.tensor(ids[60:]).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(own, expected[59:], atol=2e-4, rtol=1e-4)


def test_groups_hold_every_prompt_once_and_fit(made: tuple[Bench, Path, Probe]) -> None:
    _, _, probe = made
    lengths = [600, 30, 64, 65, 600, *[10] * 90]
    groups = list(probe.groups(lengths))
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) <= MOST_ROWS
        assert 1 + sum(-(-lengths[i] // PAGE_SIZE) for i in group) <= probe._cache.num_pages


def test_draws_follow_the_distribution_and_their_seed() -> None:
    logits = torch.tensor([[0.0, 1.0, -9.0]]).repeat(4000, 1)
    first, again = (sampled(0.5, torch.Generator().manual_seed(1))(logits) for _ in range(2))
    assert torch.equal(first, again)
    share = float((first == 1).float().mean())
    assert share == pytest.approx(torch.tensor([0.0, 2.0, -18.0]).softmax(0)[1].item(), abs=0.03)


def test_a_cache_too_small_for_a_prompt_is_refused(made: tuple[Bench, Path, Probe]) -> None:
    bench, overlay, _ = made
    with pytest.raises(ConfigError, match="one prompt may have 640"):
        Probe(bench.folder, overlay, device="cpu", dtype="float32", kv_cache_bytes=1 << 16)
