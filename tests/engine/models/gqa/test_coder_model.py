"""Qwen2.5-Coder-1.5B in float32 against Hugging Face transformers loading the same GGUF file.

The file has 1.1 GB, and no test fetches it. It takes half an hour on two cores, so it runs only if DSA_TEST_CODER=1 asks for
it. Each of the two models takes 7 GB, so ours computes everything first, keeps some rows of logits, and is gone before
transformers loads.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from server.hub.catalogue import CODER_MODEL, MODELS
from server.hub.models import model_file
from server.text.loading import load_tokenizer
from tests.engine.kit import Lab, Run

FILE = model_file(CODER_MODEL)
PRESENT = FILE.is_file() and FILE.stat().st_size == MODELS[CODER_MODEL].source.size
ASKED = os.environ.get("DSA_TEST_CODER") == "1"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.model,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not ASKED, reason="takes half an hour: DSA_TEST_CODER=1 asks for it"),
    pytest.mark.skipif(
        not PRESENT, reason=f"{FILE} is not there: `dsa pull {CODER_MODEL}` fetches it (1.1 GB)"
    ),
]

TOLERANCE = 5e-4  # of the largest logit: 28 layers of float32
LENGTHS = (1, 63, 64, 65, 1000)


class Computed(NamedTuple):
    """Logits of one request's rows, with the tokens that they follow from."""

    tokens: list[int]
    rows: list[tuple[int, Tensor]]  # position, [vocab]
    cached: int


def sampled(length: int, found: list[int]) -> set[int]:
    """Some of the rows that were computed: the first and last ones, page edges, and one between."""
    edges = {0, 62, 63, 64, 65, 127, 128, length // 2, length - 3, length - 2, length - 1}
    return edges & set(found) | {found[0], found[-1]}


def kept(run: Run, lab: Lab) -> dict[str, Computed]:
    computed = {}
    for name, tokens in run.tokens.items():
        wanted = sampled(len(tokens), sorted(run.rows[name]))
        rows = [(at, lab.logits(one.unsqueeze(0))[0]) for at in sorted(wanted) for one in run.rows[name][at]]
        usage = run.ends[name].usage
        assert usage is not None
        computed[name] = Computed(tokens, rows, usage.cached_tokens)
    return computed


def ours(text: list[int]) -> dict[str, dict[str, Computed]]:
    """Every run of this file: its name -> what its requests computed."""
    lab = Lab(FILE, kv_cache_bytes=1 << 30, max_model_len=8192)
    found = {}
    run = lab.run(budget=4096, caching=False, running=1)
    for length in LENGTHS:
        run.submit(str(length), text[:length], 3)
    found["alone"] = kept(run.finish(), lab)
    run = lab.run(budget=300, caching=False)
    for length in LENGTHS:
        run.submit(str(length), text[:length], 3)
    found["together"] = kept(run.finish(), lab)
    run = lab.run(budget=2048)
    for name, length in (("cold", 700), ("warm", 700), ("longer", 900)):
        run.submit(name, text[:length], 3)
        run.finish()
    found["prefix"] = kept(run, lab)
    run = lab.run(budget=1000, caching=False)
    run.submit("4000", text[:4000], 3)
    found["long"] = kept(run.finish(), lab)
    return found


class Both:
    """What ours computed, and transformers' model."""

    def __init__(self, path: Path) -> None:
        text = load_tokenizer(path).encode(inspect.getsource(argparse))
        assert len(text) >= 4000
        with torch.inference_mode():
            self.found = ours(text)
        gc.collect()
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.hidden: dict[tuple[int, ...], Tensor] = {}  # the slow part, kept for the next run

    def worst(self, computed: Computed) -> float:
        """The largest difference of a row, relative to the row's largest logit."""
        key, error = tuple(computed.tokens), 0.0
        with torch.no_grad():
            if key not in self.hidden:
                self.hidden[key] = self.model.model(torch.tensor([computed.tokens])).last_hidden_state[0]
            for position, row in computed.rows:
                expected = self.model.lm_head(self.hidden[key][position])
                error = max(error, float((row - expected).abs().max() / expected.abs().max()))
        return error


@pytest.fixture(scope="module")
def both() -> Both:
    return Both(FILE)


@pytest.mark.parametrize("run", ["alone", "together"])
@pytest.mark.parametrize("length", LENGTHS)
def test_alone_and_in_chunks_with_others(both: Both, run: str, length: int) -> None:
    assert both.worst(both.found[run][str(length)]) < TOLERANCE


@pytest.mark.parametrize(("name", "cached"), [("cold", 0), ("warm", 640), ("longer", 640)])
def test_on_a_prefix_hit(both: Both, name: str, cached: int) -> None:
    assert both.found["prefix"][name].cached == cached
    assert both.worst(both.found["prefix"][name]) < TOLERANCE


def test_of_4000_tokens(both: Both) -> None:
    assert both.worst(both.found["long"]["4000"]) < TOLERANCE


def test_the_comparison_can_fail(both: Both) -> None:
    """Logits of another position are far off."""
    computed = both.found["alone"]["64"]
    moved = computed._replace(rows=[(position - 1, row) for position, row in computed.rows[1:]])
    assert both.worst(moved) > 0.1
