"""Rank 0's runner: every plan goes to the workers before it is computed here."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.attention.batch import Batch
from engine.errors import RankError
from engine.memory.planes import PagedCache
from engine.models.family import Model
from engine.parallel.team import Team
from engine.plan.tiles import TileCosts
from engine.plan.types import StepPlan
from engine.step.drafting import LayerDrafter
from engine.step.runner import Runner


class LeadRunner(Runner):
    """Hidden states are computed by all ranks; logits, tokens and drafts by rank 0, which alone has the head."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        costs: TileCosts,
        device: torch.device,
        drafter: LayerDrafter | None,
        team: Team,
    ) -> None:
        super().__init__(model, cache, costs, device, drafter)
        self._team = team

    def forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """See `Runner.forward`.

        Raises:
            RankError: some rank failed; the others have computed the step, or still wait for it, so that no
                other step can follow.
        """
        try:
            self._team.send(plan)
            return super().forward(plan)
        except Exception as error:
            reason = self._team.reason() or f"rank 0 failed: {type(error).__name__}: {error}"
            raise RankError(reason) from error
