"""The measures of faithfulness on cases made by hand, and a whole measurement of a tiny model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lab.corpus.chatml import ChatTurn
from lab.corpus.manifest import CorpusPrompt, NeedleRow
from lab.evaluate import loss, needles
from lab.evaluate.faithful import (
    Answered,
    Prompted,
    is_clipped,
    is_repeating,
    measure,
    summarise,
    verdicts,
)
from lab.evaluate.material import AskedNeedle, HeldOut
from lab.probe import Probe
from tests.engine.kit import VOCAB, random_overlay
from tests.lab.distill.kit import Bench, one_thread


@pytest.mark.parametrize(
    ("text", "clipped"),
    [
        ("It is so.", False),
        ("The lightning indexer is a small learned", True),
        ("", True),
        ('He said "yes."', False),
        ("Two points:\n\n- the first\n- the second", False),
        ("1. one\n2. two", False),
        ("```\nprint(1)\n```", False),
        ("It returns x = f(1)", False),
        ("**Done!**", False),
        ("First this.\nThen that", True),
    ],
)
def test_answers_that_end_within_a_sentence(text: str, clipped: bool) -> None:
    assert is_clipped(text) is clipped


def test_answers_that_repeat_themselves() -> None:
    assert is_repeating([1, 2, 3, *([4, 5, 6, 7, 8, 9, 10, 11] * 3)])
    assert is_repeating([7] * 24)
    assert not is_repeating([7] * 23)
    assert not is_repeating(list(range(200)))
    assert not is_repeating([*([1, 2] * 30), 3])
    assert not is_repeating([])


def answered(agreed: int, nats: float, length: int, *, ended: bool = True, clipped: bool = False) -> Answered:
    return Answered(
        agreed=agreed, nats=nats, length=length, ended=ended, clipped=clipped, repeats=False, text=""
    )


def test_rows_weigh_tokens_and_are_by_kind_and_length() -> None:
    prompts = [
        Prompted(kind="code", prompt_tokens=900, tokens=10, answers={"dense": answered(10, 0, 9), "512": answered(9, 0.1, 12)}),
        Prompted(kind="code", prompt_tokens=5000, tokens=30, answers={"dense": answered(30, 0, 30, ended=False), "512": answered(24, 1.1, 30, ended=False)}),
        Prompted(kind="talk", prompt_tokens=1500, tokens=20, answers={"dense": answered(20, 0, 19), "512": answered(20, 0.0, 6, clipped=True)}),
    ]  # fmt: skip
    rows = summarise(prompts, [512])
    every = rows["512"]["all"]
    assert (every.prompts, every.tokens) == (3, 60)
    assert every.agreement == pytest.approx(53 / 60)
    assert every.kl == pytest.approx(1.2 / 60)
    assert every.length_ratio == pytest.approx(48 / 58)
    assert (every.clipped, every.unended) == (1, 1)
    assert every.agreement_interval is None  # one kind has one prompt: its variation is not known
    interval = rows["512"]["code"].agreement_interval
    assert interval is not None
    assert interval.low < 33 / 40 < interval.high
    assert set(rows["512"]) == {"code", "talk", "from 0", "from 1024", "from 4096", "all"}
    assert rows["dense"]["all"].agreement == 1


def test_bars_of_the_default_setting() -> None:
    good = Prompted(kind="code", prompt_tokens=900, tokens=100, answers={"dense": answered(100, 0, 99), "512": answered(95, 1.2, 90)})  # fmt: skip
    assert [v.outcome for v in _judged(good)] == ["met"] * 4
    bad = Prompted(kind="code", prompt_tokens=900, tokens=100, answers={"dense": answered(100, 0, 99), "512": answered(94, 1.4, 80, clipped=True)})  # fmt: skip
    assert [v.outcome for v in _judged(bad)] == ["missed"] * 4
    assert verdicts(_result([good]), 256) == []


def _result(prompts: list[Prompted]):  # type: ignore[no-untyped-def]
    from lab.evaluate.faithful import FaithfulResult

    return FaithfulResult(
        answer_tokens=9, device="cpu", dtype="float32", kernels="native", prompts=prompts, skipped=0,
        rows=summarise(prompts, [512]),
    )  # fmt: skip


def _judged(prompt: Prompted):  # type: ignore[no-untyped-def]
    return verdicts(_result([prompt]), 512)


def ids_of(seed: int, count: int) -> tuple[int, ...]:
    made = torch.randint(3, VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return tuple(made.tolist())


def prompt_of(kind: str, count: int) -> CorpusPrompt:
    return CorpusPrompt(kind=kind, source="s", tokens=count, messages=(ChatTurn("user", "x"),))


def shown(ids: object) -> str:
    return " ".join(f"<{i}>" for i in ids)  # type: ignore[attr-defined]


def silent(done: int, total: int) -> None:
    """Ignore progress."""


def test_a_tiny_model_is_measured_whole(tmp_path: Path) -> None:
    with one_thread():
        bench = Bench(tmp_path / "model")
        overlay = random_overlay(tmp_path / "it.safetensors", bench.source, rank=0)
        probe = Probe(bench.folder, overlay, device="cpu", dtype="float32", kv_cache_bytes=8 << 20)
        asked = [(prompt_of("code", n), ids_of(n, n)) for n in (40, 300, 120, 639)]  # the last leaves no room
        result = measure(probe, asked, [32, 512], frozenset(), shown, silent, answer_tokens=10)
        assert (len(result.prompts), result.skipped) == (3, 1)
        for prompt, (_, ids) in zip(result.prompts, asked, strict=False):
            assert prompt.prompt_tokens == len(ids)
            dense, wide, narrow = (prompt.answers[s] for s in ("dense", "512", "32"))
            assert (dense.agreed, dense.length) == (10, 10)
            assert dense.nats == pytest.approx(0, abs=1e-4)
            # 512 holds every context here, so it is dense.
            assert (wide.agreed, wide.text) == (10, dense.text)
            assert wide.nats == pytest.approx(0, abs=1e-4)
            said = [int(piece.strip("<>")) for piece in dense.text.split()]
            truth = probe.forced(probe.read([ids], 10, None)[0], said)
            own = probe.forced(probe.read([ids], 10, 32)[0], said)
            assert narrow.nats == pytest.approx(
                float(F.kl_div(own, truth, log_target=True, reduction="sum")), rel=1e-3
            )
            assert narrow.agreed == int((own.argmax(-1) == torch.tensor(said)).sum())
            assert narrow.nats > 0.01

        ids = ids_of(7, 200)
        value = probe.answer(probe.read([ids], 32, None), 32, frozenset())[0].token_ids[3]
        asked_for = [_needle(ids, f"<{value}>"), _needle(ids_of(8, 90), "never")]
        kept = needles.measure(probe, asked_for, [512], frozenset(), shown, silent)
        assert (kept.retention["512"].right, kept.retention["512"].of) == (1, 1)
        assert kept.accuracy["dense"]["all"].right == 1
        assert "512" not in kept.needles[1].answers  # dense does not find it: nobody else is asked

        lost = loss.measure(probe, [HeldOut(kind="code", start=0, ids=ids_of(9, 600))], [512], silent)
        assert lost.texts[0].length == 600
        assert math.isfinite(sum(lost.texts[0].nats["512"]))


def _needle(ids: tuple[int, ...], value: str) -> AskedNeedle:
    row = NeedleRow(
        start=0, length=len(ids), context=len(ids), depth=0.5, phrasing=0, statement="", question="", value=value,
        needle=(0, 1),
    )  # fmt: skip
    return AskedNeedle(row, ids)
