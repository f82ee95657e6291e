"""An engine process without a model: the real loop, scheduler and messages, and a runner that makes tokens at a given pace.

`benchmarks.wayout` starts it in the place of `engine.step.process`. A step takes `DSA_WAYOUT_STEP` seconds, in which the
loop plans the next one, as it does beside a GPU; then the process sleeps for what is left of them. The tokens are whole words of the model's vocabulary.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.step import SHAPE, TILES
from engine.checkpoint.loader import LoadReport
from engine.config import PAGE_SIZE, EngineConfig
from engine.plan.cost import CostModel, assumed_coefficients
from engine.plan.meter import Meter
from engine.plan.scheduler import Scheduler
from engine.plan.types import Sampled, StepPlan, StepResult
from engine.protocol import Capacity, IndexerInfo, ModelInfo, Ready
from engine.step import process
from engine.step.build import Built
from engine.step.core import EngineCore
from engine.step.masking import TokenMasks
from server.text.loading import load_tokenizer

STEP = "DSA_WAYOUT_STEP"
"""The environment's name of the seconds of a step."""

_WORD = re.compile(r" [a-z]{2,}")
_PAGES = 1 << 16
_MAX_LEN = 8192


class _Paced(NamedTuple):
    drawn: StepResult
    over: float  # on the monotonic clock

    def draw(self, masks: TokenMasks | None) -> None:
        """Words are drawn without masks."""

    def result(self) -> StepResult:
        time.sleep(max(0.0, self.over - time.monotonic()))
        return self.drawn


class PacedRunner:
    """Draws words. A step begins when the one before it is over, as on a device, and takes some seconds."""

    ahead = True

    def __init__(self, words: list[int], seconds: float) -> None:
        self._words = random.Random(0).choices(words, k=1 << 16)
        self._next = 0
        self._seconds = seconds
        self._over = 0.0

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None, *, hold: bool = False) -> _Paced:
        """Draw a word for each request that wants a token."""
        sampled = []
        for request in plan.requests:
            if request.sample is None:
                sampled.append(Sampled())
                continue
            self._next = (self._next + 1) % len(self._words)
            sampled.append(Sampled(token_ids=(self._words[self._next],)))
        self._over = max(self._over, time.monotonic()) + self._seconds
        return _Paced(StepResult(sampled=tuple(sampled)), self._over)


def build(
    config: EngineConfig,
    progress: Callable[[str, int, int], None],
    on_lost: Any = None,
    vocabulary: Any = None,
) -> Built:
    """Build the engine around the runner. Of `config` only the tokenizer's place and the scheduler's limits count."""
    assert config.token_budget is not None
    assert config.max_running is not None
    tokenizer = load_tokenizer(Path(config.weights))
    words = [i for i in range(tokenizer.vocab_size) if _WORD.fullmatch(tokenizer.token_text(i))]
    costs = CostModel(SHAPE, assumed_coefficients(SHAPE, "cpu"), TILES)
    scheduler = Scheduler(
        _PAGES, token_budget=config.token_budget, max_running=config.max_running, max_model_len=_MAX_LEN,
        prefix_caching=True,
    )  # fmt: skip
    runner = PacedRunner(words, float(os.environ[STEP]))
    indexer = IndexerInfo(num_heads=4, head_dim=32, rope_dim=16, default_index_top_k=512, source="none")
    ready = Ready(
        model=ModelInfo(
            architecture="none", num_layers=30, num_parameters=0, vocab_size=tokenizer.vocab_size,
            max_model_len=_MAX_LEN, device="none", dtype="none", indexer=indexer,
        ),
        capacity=Capacity(
            num_pages=_PAGES, page_size=PAGE_SIZE, page_bytes=1, token_budget=config.token_budget,
            max_running=config.max_running,
        ),
    )  # fmt: skip
    return Built(
        core=EngineCore(scheduler, runner, Meter(costs), sparse=True),
        runner=runner,  # type: ignore[arg-type]
        ahead=runner,
        cache=None,  # type: ignore[arg-type]
        costs=costs,
        ready=ready,
        unused_tensors=(),
        weights=LoadReport(0, 0, 0, 0, 0, 0.0, (), ()),
        backend="none",
        kernels="no model: words at a given pace",
    )


if __name__ == "__main__":
    with patch.object(process, "build", build):
        process.main()
