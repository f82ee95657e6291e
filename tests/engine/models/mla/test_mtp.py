"""The MTP layer: its drafts are those of its formula, and the texts are the same as without it, under any schedule.

transformers has no MTP, but its decoder layer can be given the projected inputs, so only the projection is
written out here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.plan.types import StepPlan, StepResult
from engine.step.build import build
from engine.step.masking import TokenMasks
from engine.step.runner import AtOnce
from tests.engine.kit import Lab, Run, tiny_checkpoint
from tests.engine.models.mla.kit import VOCAB, tiny_deepseek

EPS = 1e-6


class Tiny:
    def __init__(self, folder: Path) -> None:
        self.main = tiny_deepseek("deepseek_v32", folder, num_nextn_predict_layers=1)
        self.layer = tiny_deepseek(
            "deepseek_v32", folder / "mtp", seed=3, num_hidden_layers=1, first_k_dense_replace=0
        )
        stored = load_file(folder / "mtp" / "model.safetensors")
        renamed = {"model.embed_tokens.": "embed_tokens.", "model.norm.": "shared_head.norm.",
                   "lm_head.": "shared_head.head.", "model.layers.0.": ""}  # fmt: skip
        own: dict[str, Tensor] = {}
        for name, tensor in stored.items():
            for old, new in renamed.items():
                if name.startswith(old):
                    own[new + name.removeprefix(old)] = tensor
        hidden = self.main.config.hidden_size
        generator = torch.Generator().manual_seed(4)
        self.enorm, self.hnorm = (1 + 0.3 * torch.randn(hidden, generator=generator) for _ in range(2))
        self.eh_proj = torch.randn(hidden, 2 * hidden, generator=generator) * 0.1
        # Heads that agree often enough for drafts to hold, and not always.
        own["shared_head.head.weight"] = self.main.lm_head.weight.detach().clone()
        self.layer.lm_head.weight.data = own["shared_head.head.weight"]
        own |= {"enorm.weight": self.enorm, "hnorm.weight": self.hnorm, "eh_proj.weight": self.eh_proj}
        file = folder / "model.safetensors"
        whole = load_file(file) | {f"model.layers.3.{name}": tensor for name, tensor in own.items()}
        save_file(whole, file, metadata={"format": "pt"})
        self.folder = folder
        self.plain = Lab(folder)

    @torch.no_grad()
    def guess(self, known: list[int], count: int) -> tuple[int, ...]:
        """The greedy drafts after `known`, by the formula."""

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return x * (x.pow(2).mean(-1, keepdim=True) + EPS).rsqrt() * weight

        hidden = self.main.model(torch.tensor([known[:-1]]), use_cache=False).last_hidden_state[0]
        tokens, drafts = known[1:], []
        for _ in range(count):
            embedded = self.layer.model.embed_tokens(torch.tensor(tokens))
            x = torch.cat((normed(embedded, self.enorm), normed(hidden, self.hnorm)), -1) @ self.eh_proj.T
            out = self.layer.model(inputs_embeds=x.unsqueeze(0), use_cache=False).last_hidden_state[0]
            drafts.append(int(self.layer.lm_head(out[-1]).argmax()))
            tokens, hidden = [*tokens, drafts[-1]], torch.cat((hidden, out[-1:]))
        return tuple(drafts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("mtp"))


def tokens_of(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Listener(AtOnce):
    """A runner that compares each proposal with the formula."""

    def __init__(self, run: Run, tiny: Tiny, count: int) -> None:
        self._run, self._tiny, self._count = run, tiny, count
        self.compared = 0

    def run(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        result = Run.run(self._run, plan, masks)
        for request, one in zip(plan.requests, result.sampled, strict=True):
            if one.token_ids:
                end = request.start + len(request.token_ids) - request.num_drafts
                known = [*self._run.tokens[request.request_id][:end], *one.token_ids]
                drafts = one.draft_token_ids
                assert drafts == self._tiny.guess(known, self._count)[: len(drafts)]
                assert len(drafts) >= 1
                self.compared += len(drafts)
            else:
                assert one.draft_token_ids == ()
        return result


@pytest.mark.parametrize(("budget", "count"), [(7, 1), (64, 2), (512, 3)])
def test_guesses_are_the_formulas(tiny: Tiny, budget: int, count: int) -> None:
    lab = Lab(tiny.folder, drafter="mtp", speculative_tokens=count)
    run = lab.run(budget=budget, running=4, caching=False, draft_tokens=count)
    run.core._runner = listener = Listener(run, tiny, count)
    for number, length in enumerate((1, 63, 64, 90)):
        run.submit(str(number), tokens_of(number, length), 8, 24)
    run.finish()
    assert listener.compared > 20


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("pages", "budget"), [(60, 512), (6, 40)])
def test_texts_are_those_without(tiny: Tiny, count: int, pages: int, budget: int) -> None:
    lab = Lab(tiny.folder, drafter="mtp", speculative_tokens=count)
    runs = tiny.plain.run(), lab.run(pages=pages, budget=budget, running=8, draft_tokens=count)
    for run in runs:
        for number in range(6):
            sampling: dict[str, Any] = {"temperature": (0.0, 0.8, 1.2)[number % 3], "seed": number}
            run.submit(
                str(number), tokens_of(number // 2, 40 + 5 * number), 30, (24, None)[number % 2], **sampling
            )
        run.finish()
    plain, drafting = runs
    assert drafting.tokens == plain.tokens
    lengths = drafting.core.stats().draft_lengths_total
    assert lengths[0] > 0
    assert sum(lengths[1:]) > 0
    assert (drafting.core.stats().preemptions_total > 0) == (pages == 6)


def test_its_tensors_are_used_and_a_checkpoint_without_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    assert Lab(tiny.folder, drafter="mtp").built.unused_tensors == ()
    assert any("layers.3." in name for name in tiny.plain.built.unused_tensors)
    tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="has no multi-token prediction layer; use ngram or off"):
        build(EngineConfig(weights=str(tmp_path), drafter="mtp"))
