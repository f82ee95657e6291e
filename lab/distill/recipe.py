"""What decides the result of a training run, with the corpus and the base model."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.errors import ConfigError

Count = Annotated[int, Meta(ge=0)]
PositiveCount = Annotated[int, Meta(ge=1)]
Rate = Annotated[float, Meta(gt=0)]
Stage = Literal["dense", "sparse", "adapt"]

EXAMPLE = '{"warmup_steps": 50}'


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training loop's numbers."""

    seed: Count = 0
    max_length: PositiveCount = 8192
    min_length: PositiveCount = 512
    cut: bool = True  # longer sequences to max_length; else they are left out, with an answer at their end
    rows: PositiveCount = 256  # query rows a sequence
    first_row: Count = 64  # rows before it see too few tokens to choose among
    focus_share: Annotated[float, Meta(ge=0, le=1)] = 0.25  # of the rows, at most, from a chat's answers
    focus_before: Count = 0  # tokens before an answer that count as its own: the question
    # kind of text -> its share of the sequences; empty: as many as the corpus has
    shares: dict[str, Annotated[float, Meta(gt=0)]] = {}
    # what the heads' attention is put together by: the paper's sum, or the largest, which gives a head that
    # looks at one token alone as much say there as many that look around
    target: Literal["sum", "max"] = "sum"
    sequences_per_step: PositiveCount = 4
    warmup_steps: Count = 600  # dense stage
    sparse_steps: Count = 200
    learning_rate: Rate = 1e-3  # of the dense stage, arXiv 2512.02556
    sparse_learning_rate: Rate = 2e-4
    # of the sparse adapter and, at the sparse stage's rate, the indexers with it; 0: no adapter
    adapt_steps: Count = 0
    adapter_rank: PositiveCount = 16
    adapter_learning_rate: Rate = 1e-3
    answer_weight: Annotated[float, Meta(ge=0)] = (
        0.0  # of the answers' own loss, beside the distance to dense
    )
    ramp_steps: Count = 20
    final_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.1  # of the learning rate, at each stage's end
    clip: Rate = 1.0  # gradient norm of each layer
    # drawn anew for each sequence
    sparse_top_k: Annotated[tuple[PositiveCount, ...], Meta(min_length=1)] = (128, 256, 512)
    sparse_support: Literal["selected", "causal"] = "selected"
    report_top_k: PositiveCount = 256

    def __post_init__(self) -> None:
        if not self.first_row < self.min_length <= self.max_length:
            raise ValueError(
                f"first_row ({self.first_row}) must be below min_length ({self.min_length}), "
                f"and that at most max_length ({self.max_length})"
            )
        if not self.total_steps:
            raise ValueError("warmup_steps, sparse_steps and adapt_steps are all 0")

    @property
    def total_steps(self) -> int:
        """Of all stages."""
        return self.warmup_steps + self.sparse_steps + self.adapt_steps

    def stage(self, step: int) -> tuple[Stage, int, int]:
        """The stage that a step is in, its number within, and how many steps that stage has."""
        stages: tuple[tuple[Stage, int], ...] = (
            ("dense", self.warmup_steps), ("sparse", self.sparse_steps), ("adapt", self.adapt_steps),
        )  # fmt: skip
        for name, length in stages:
            if step < length:
                return name, step, length
            step -= length
        raise ValueError("the step is beyond the recipe's last")

    def rate(self, step: int) -> float:
        """The indexers' learning rate at a step."""
        stage, at, length = self.stage(step)
        return self._shaped(self.learning_rate if stage == "dense" else self.sparse_learning_rate, at, length)

    def adapter_rate(self, step: int) -> float:
        """The adapter's; 0 before its stage."""
        stage, at, length = self.stage(step)
        return self._shaped(self.adapter_learning_rate, at, length) if stage == "adapt" else 0.0

    def _shaped(self, peak: float, at: int, length: int) -> float:
        """Linear ramp, then a cosine to `final_fraction`, in each stage anew."""
        if at < self.ramp_steps:
            return peak * (at + 1) / self.ramp_steps
        progress = (at - self.ramp_steps) / max(1, length - self.ramp_steps)
        return peak * (
            self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        )


def read_recipe(text: str) -> Recipe:
    """A recipe from JSON; what it leaves out has its default.

    Raises:
        ConfigError: it is no JSON, or a field is unknown or out of range.
    """
    try:
        return msgspec.json.decode(text, type=Recipe)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip(".`")
        if "unknown field" in what:
            what += f"; there are {', '.join(Recipe.__struct_fields__)}"
        raise ConfigError(f"the recipe cannot be used: {field + ': ' if field else ''}{what}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the recipe {text!r:.80} is not JSON ({error}); expected such as {EXAMPLE}"
        ) from None
