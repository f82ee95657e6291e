"""The dense rule: against its definition, the same everywhere, and written in one place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import PAGE_SIZE
from engine.plan.cost import CostModel, ModelShape, assumed_coefficients
from engine.plan.prefix import sparsity_salt
from engine.plan.sparsity import dense_mask, dense_rows, is_dense, row_index_top_k
from engine.plan.tiles import Segment, TileCosts, cut
from engine.plan.types import ScheduledRequest

ROOT = Path(__file__).parents[3]
COSTS = TileCosts(budget_bytes=1 << 20, index_row_bytes=32, attention_row_bytes=36, token_bytes=1536)
SHAPE = ModelShape(
    row_flops=1, sparse_row_flops=1, head_flops=1, pair_flops=1, index_pair_flops=1, weight_bytes=1,
    kv_token_bytes=1, index_token_bytes=1,
)  # fmt: skip
MODEL = CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), COSTS)

sparsities = st.one_of(st.none(), st.integers(1, 700))


@given(context=st.integers(1, 800), index_top_k=sparsities)
def test_a_row_is_dense_while_its_selection_would_be_its_context(
    context: int, index_top_k: int | None
) -> None:
    wanted = context if index_top_k is None else min(context, index_top_k)
    selected = row_index_top_k(context, index_top_k)
    assert is_dense(context, index_top_k) == (wanted == context) == (selected == 0)
    assert (selected or context) == wanted


@given(start=st.integers(0, 900), rows=st.integers(1, 300), index_top_k=sparsities)
def test_dense_rows_come_first(start: int, rows: int, index_top_k: int | None) -> None:
    each = [is_dense(start + i + 1, index_top_k) for i in range(rows)]
    count = dense_rows(start, rows, index_top_k)
    assert each == [True] * count + [False] * (rows - count)


@given(contexts=st.lists(st.integers(1, 50), max_size=20), index_top_k=st.integers(1, 50))
def test_arrays_and_tensors_as_integers(contexts: list[int], index_top_k: int) -> None:
    each = [is_dense(context, index_top_k) for context in contexts]
    assert dense_mask(np.array(contexts, dtype=np.int64), index_top_k).tolist() == each
    assert dense_mask(torch.tensor(contexts, dtype=torch.int64), index_top_k).tolist() == each


@given(start=st.integers(0, 900), rows=st.integers(1, 300), index_top_k=sparsities)
def test_tiles_costs_and_prefix_keys_agree(start: int, rows: int, index_top_k: int | None) -> None:
    each = [is_dense(start + i + 1, index_top_k) for i in range(rows)]
    pages = tuple(range((start + rows - 1) // PAGE_SIZE + 1))
    segment = Segment(first_row=0, num_rows=rows, start=start, page_ids=pages, index_top_k=index_top_k)
    for tile in cut([segment], COSTS):
        assert all(each[row] == (tile.form == "dense") for line in tile.rows for row in line)
    request = ScheduledRequest(
        request_id="a",
        token_ids=(1,) * rows,
        start=start,
        page_ids=pages,
        index_top_k=index_top_k,
        sample=None,
    )
    counts = MODEL.counts(request)
    assert counts.sparse_rows == each.count(False)
    assert counts.attended == sum(
        row_index_top_k(start + i + 1, index_top_k) or start + i + 1 for i in range(rows)
    )
    for i, dense in enumerate(each):
        if (start + i + 1) % PAGE_SIZE == 0:
            assert (sparsity_salt(start + i + 1, index_top_k) is None) == dense


_LENGTH = r"\b(?:context|contexts|position|positions|start|end|page_end|total|seen)\b"
_NUMBER = r"(?:\b|_)(?:index_)?top_k\b"
_RULE = re.compile(
    rf"{_LENGTH}[^\n<>]*(?<!-)[<>]=?\s*[\w.]*{_NUMBER}"  # start + rows <= top_k
    rf"|{_NUMBER}(?:\[\w+\])?\s*[<>]=?[^\n,]*{_LENGTH}"  # top_k[row] <= step->positions[row]
    rf"|{_NUMBER}\s*-\s*(?:\w+\.)?start"  # top_k - start
)


@pytest.mark.parametrize(
    "copy",
    [
        "if top_k is None or end <= top_k:",
        "if index_top_k is None or start + rows <= index_top_k:",
        "return max(0, min(self.num_rows, self.top_k - self.start))",
        "return step->top_k[row] > 0 && step->top_k[row] <= step->positions[row];",
        "torch.arange(total, device=x.device).unsqueeze(-1) >= top_k",
        "dense = index_top_k >= context",
    ],
)
def test_the_search_finds_copies(copy: str) -> None:
    assert _RULE.search(copy)


def test_the_rule_is_written_once() -> None:
    """What asks `engine.plan.sparsity` holds no comparison of its own, in Python or in C."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("engine", "lab", "server")
        for pattern in ("*.py", "*.c", "*.h")
        for path in sorted((ROOT / folder).rglob(pattern))
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if _RULE.search(line) and path != ROOT / "engine/plan/sparsity.py"
    ]
    assert found == []
