"""The runner of rank 0. It sends every plan to the workers before it computes the plan itself."""

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
from engine.step.sampler import Draw


class LeadRunner(Runner):
    """All ranks compute the hidden states. Only rank 0 has the head, so it computes logits, tokens and drafts."""

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        costs: TileCosts,
        device: torch.device,
        drafter: LayerDrafter | None,
        draw: Draw,
        team: Team,
    ) -> None:
        super().__init__(model, cache, costs, device, drafter, draw)
        self._team = team

    def forward(self, plan: StepPlan) -> tuple[Batch, Tensor]:
        """Compute the plan's rows on all ranks; returns what `Runner.forward` returns.

        Raises:
            RankError: a rank failed. The other ranks have computed the step or still wait in it, so no other
                step can follow.
        """
        try:
            self._team.send(plan)
            return super().forward(plan)
        except Exception as error:
            reason = self._team.reason() or f"rank 0 failed: {type(error).__name__}: {error}"
            raise RankError(reason) from error
