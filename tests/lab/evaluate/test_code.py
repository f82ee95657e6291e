"""Code tasks: the texts, the child that runs answers, the counts, and a whole measurement of a tiny model."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lab.corpus.codetasks import CASES, KINDS, make_code_tasks
from lab.corpus.documents import Document
from lab.corpus.manifest import CodeTask
from lab.evaluate.code import CodeResult, Tried, measure, summarise, verdicts
from lab.evaluate.report import code_table
from lab.evaluate.sandbox import code_of, passes
from lab.probe import Probe
from tests.engine.kit import VOCAB, random_overlay
from tests.lab.corpus.test_build import CHAT, code, documents
from tests.lab.distill.kit import Bench, one_thread

PASTED = [Document(f"c{i}", f"x/{i}.py#0", "code", "heldout", code(i, 20)) for i in range(12)]
TASKS = make_code_tasks(PASTED, CHAT, 0, (2000, 3000), 40)
SOLUTIONS = {
    "parcel": "price = {w}_BASE_FEE + weight_grams // {w}_STEP_GRAMS * {w}_STEP_FEE\n"
    "    return price * {w}_EXPRESS_FACTOR if express else price",
    "shard": "return (user_id * {w}_SHARD_FACTOR + {w}_SHARD_OFFSET) % {w}_SHARD_COUNT",
    "spans": "return [items[i : i + {w}_WINDOW] for i in range(0, len(items), {w}_STRIDE)]",
}


def answer(task: CodeTask, body: str) -> str:
    signature = next(
        line for line in task.messages[-1].content.split("\n") if line.startswith(f"def {task.function}(")
    )
    return f"Here it is:\n```python\nfrom {task.package}.{task.module} import *\n\n{signature}\n    {body}\n```\nDone."


def test_every_kind_meets_every_length_and_depth_and_the_rule_stands_once() -> None:
    assert [task.kind for task in TASKS[:10]] == list(KINDS)
    assert {task.kind for task in TASKS if task.tokens > 2000} == set(KINDS)
    assert len({round(task.depth, 1) for task in TASKS}) >= 4
    for task in TASKS:
        text = task.messages[-1].content
        assert text.count(task.spec.rstrip()) == 1
        before, after = text.split(task.spec.rstrip())
        constants = [
            w for w in task.spec.replace("(", " ").split() if w.startswith(task.package.upper() + "_")
        ]
        assert constants
        assert not any(name in before + after for name in constants), "the request tells a name of the rule"
        assert len(task.cases) == CASES
        assert task.tokens == len(CHAT.render(task.messages, generation_prompt=True).ids)
        assert 0.85 * 2000 < task.tokens <= 3000
        assert len({repr(case.expected) for case in task.cases}) > 1, "a constant would pass"
    assert make_code_tasks(PASTED, CHAT, 0, (2000, 3000), 40) == TASKS
    assert make_code_tasks(PASTED, CHAT, 1, (2000, 3000), 40) != TASKS
    assert make_code_tasks(documents("train"), CHAT, 0, (2000,), 4) == []


@pytest.mark.process
@pytest.mark.parametrize("kind", SOLUTIONS)
def test_a_right_answer_passes_and_a_wrong_one_does_not(kind: str) -> None:
    task = next(task for task in TASKS if task.kind == kind)
    right = SOLUTIONS[kind].format(w=task.package.upper())
    assert passes(task, answer(task, right))
    assert not passes(task, answer(task, right.replace("return ", "return None and ")))
    assert not passes(task, answer(task, right.replace(task.package.upper(), "OTHER")))


@pytest.mark.process
@pytest.mark.parametrize(
    "body",
    [
        "open('x', 'w').write('x')",
        "import os; os.remove('x')",
        "import socket; socket.socket()",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
        "raise SystemExit(0)",
        "return [0] * (1 << 40)",
    ],
)
def test_what_an_answer_may_not_do_fails_it(body: str) -> None:
    task = next(task for task in TASKS if task.kind == "shard")
    right = SOLUTIONS["shard"].format(w=task.package.upper())
    assert passes(task, answer(task, f"import math; print(8); {right}")), "the standard library is there"
    assert not passes(task, answer(task, f"{body}\n    {right}" if "return" not in body else body))


@pytest.mark.process
def test_an_answer_without_an_end_is_stopped() -> None:
    task = TASKS[0]
    began = time.monotonic()
    assert not passes(task, answer(task, "import time; time.sleep(60)"), seconds=1)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("Sure:\n```py\nx = 1\ny = 2\n```\nand ```python\nz\n```", "x = 1\ny = 2"),
        ("```\nx = 1", "x = 1"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_code_of_an_answer(text: str, found: str) -> None:
    assert code_of(text) == found


def tried(tokens: int, dense: bool, sparse: bool) -> Tried:
    return Tried(
        kind="shard", prompt_tokens=tokens, depth=0.5, answers={}, passed={"dense": dense, "2048": sparse}
    )


def test_shares_are_by_length_and_the_difference_is_paired() -> None:
    result = summarise(
        [tried(3000, True, True)] * 5 + [tried(9000, True, False)] + [tried(9000, False, True)] * 2, [2048]
    )
    assert {name: (s.right, s.of) for name, s in result.rows["dense"].items()} == {
        "to 4096": (5, 5), "to 16384": (1, 3), "all": (6, 8),
    }  # fmt: skip
    above, interval = result.above_dense["2048"]
    assert above == pytest.approx(1 / 8)
    assert interval is not None
    assert interval.low < 1 / 8 < interval.high
    (verdict,) = verdicts(result, 2048)
    assert verdict.outcome == "met"
    assert verdicts(result, 512) == []
    worse = summarise([tried(3000, True, False)] + [tried(3000, True, True)] * 9, [2048])
    assert verdicts(worse, 2048)[0].outcome == "missed"
    assert code_table(result).row_count == 2


@pytest.mark.process
def test_a_whole_measurement_of_a_tiny_model(tmp_path: Path) -> None:
    """Its answers are noise: none passes. Dense and sparse answer alike while everything is selected."""
    with one_thread():
        bench = Bench(tmp_path)
        overlay = random_overlay(tmp_path / "overlay.safetensors", bench.source, rank=0)
        probe = Probe(tmp_path, overlay, device="cpu", dtype="float32", kv_cache_bytes=0, contexts=2)
        ids = [tuple((i * 7 + n) % VOCAB for i in range(100)) for n in range(3)]
        long = tuple(range(10)) * probe.max_positions
        asked = [*zip(TASKS, ids, strict=False), (TASKS[3], long)]
        found: CodeResult = measure(
            probe,
            asked,
            [probe.max_positions, 16],
            frozenset(),
            lambda ids: str(list(ids)),
            lambda done, total: None,
        )
    assert found.skipped == 1
    assert found.rows["dense"]["all"].of == 3
    assert found.rows["dense"]["all"].right == 0
    assert all(t.answers["dense"] == t.answers[str(probe.max_positions)] for t in found.tasks)
