"""The recipe: with the corpus and the base model, it decides the result of a training run."""

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
Combine = Literal["sum", "max", "output"]
"""How the heads' attention becomes one distribution; see `lab.distill.objective.attention_target`."""

EXAMPLE = '{"warmup_steps": 50}'


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The training loop's numbers."""

    seed: Count = 0
    max_length: PositiveCount = 8192
    min_length: PositiveCount = 512
    cut: bool = True  # cut longer sequences to max_length, which may cut off an answer; False leaves them out
    rows: PositiveCount = 256  # query rows in each sequence
    first_row: Count = 64  # rows before this one have too few tokens to choose from
    focus_share: Annotated[float, Meta(ge=0, le=1)] = 0.25  # at most this share of the rows is from answers
    focus_before: Count = 0  # so many tokens before an answer, the question, count as the answer's
    # kind of text -> its share of the sequences; if empty, each kind has the share that the corpus has
    shares: dict[str, Annotated[float, Meta(gt=0)]] = {}
    # how the heads' attention is combined: the paper's sum, the largest head's, or by what they add to the output
    # (see `attention_target`)
    target: Combine = "sum"
    sequences_per_step: PositiveCount = 4
    warmup_steps: Count = 600  # dense stage
    sparse_steps: Count = 200
    learning_rate: Rate = 1e-3  # in the dense stage, as in arXiv 2512.02556
    sparse_learning_rate: Rate = 2e-4
    # steps that train the adapter, and the indexers at the sparse stage's rate; 0: no adapter
    adapt_steps: Count = 0
    adapter_rank: PositiveCount = 16
    adapter_learning_rate: Rate = 1e-3
    answer_weight: Annotated[float, Meta(ge=0)] = 0.0  # factor of the answers' loss, added to the distance
    ramp_steps: Count = 20
    final_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.1  # at each stage's end, of its learning rate
    clip: Rate = 1.0  # largest gradient norm of each layer
    # each sequence draws one of these
    sparse_top_k: Annotated[tuple[PositiveCount, ...], Meta(min_length=1)] = (128, 256, 512)
    sparse_support: Literal["selected", "causal"] = "selected"
    # what the layers before have read in the sparse stage: what their indexers select, as in serving; or everything. Selecting
    # for all rows of 32K tokens takes ten times as long as dense attention, and changes little if dense and sparse are close
    sparse_forward: Literal["selected", "dense"] = "selected"
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
        """The number of steps of all stages."""
        return self.warmup_steps + self.sparse_steps + self.adapt_steps

    def stage(self, step: int) -> tuple[Stage, int, int]:
        """Return a step's stage, its number within the stage, and how many steps the stage has.

        Raises:
            ValueError: the step is beyond the last.
        """
        stages: tuple[tuple[Stage, int], ...] = (
            ("dense", self.warmup_steps), ("sparse", self.sparse_steps), ("adapt", self.adapt_steps),
        )  # fmt: skip
        for name, length in stages:
            if step < length:
                return name, step, length
            step -= length
        raise ValueError("the step is beyond the recipe's last")

    def rate(self, step: int) -> float:
        """Return the indexers' learning rate at a step."""
        stage, at, length = self.stage(step)
        return self._shaped(self.learning_rate if stage == "dense" else self.sparse_learning_rate, at, length)

    def adapter_rate(self, step: int) -> float:
        """Return the adapter's learning rate at a step; 0 before the adapter's stage."""
        stage, at, length = self.stage(step)
        return self._shaped(self.adapter_learning_rate, at, length) if stage == "adapt" else 0.0

    def _shaped(self, peak: float, at: int, length: int) -> float:
        """Return the rate within a stage: a linear ramp, then a cosine down to `final_fraction` of `peak`."""
        if at < self.ramp_steps:
            return peak * (at + 1) / self.ramp_steps
        progress = (at - self.ramp_steps) / max(1, length - self.ramp_steps)
        return peak * (
            self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        )


def read_recipe(text: str) -> Recipe:
    """Read a recipe from JSON; a missing field has its default.

    Raises:
        ConfigError: the text is not JSON, or a field is unknown or out of range.
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
