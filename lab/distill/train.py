"""The training loop: all stages, one forward pass for all layers, resumable from a checkpoint."""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.models.gqa.trunk import Trunk
from engine.parallel.ranks import ALONE, Ranks
from lab.corpus.manifest import SequenceInfo
from lab.distill.adaptation import adapt
from lab.distill.adapter import Adapter
from lab.distill.objective import divergence, top_mask
from lab.distill.parallel import shares, sum_gradients
from lab.distill.recipe import Recipe, Stage
from lab.distill.sequences import CorpusSplit, answer_rows, sample_rows
from lab.distill.sparse_forward import attend_selected, by_student, target_of
from lab.distill.student import Student

RECALL_ROWS = 64
"""The logged recall uses about so many of a sequence's rows, because selecting costs as much as learning."""


class StepLog(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the log: one optimiser step. Lists have one entry for each layer."""

    step: int
    stage: Stage
    rate: float
    loss: list[float]  # KL divergence, nats
    recall: list[float]  # attention mass captured by the best `report_top_k`
    tokens: int
    seconds: float
    distance: float | None = None  # KL(dense || sparse) of predictions, nats for each token; last stage only


class Portion(NamedTuple):
    """What a step does with one sequence."""

    sequence: SequenceInfo
    length: int  # of its tokens, after cutting
    rows: Tensor  # [n] int64, the query rows
    index_top_k: int


class Trainer:
    """Owns the student, its optimiser and the position in the data.

    Args:
        trunk: the model to learn from
        student: the indexers to train
        split: the data
        recipe: how to train
        folder: where the log and the checkpoint are
        base: the fingerprint of `trunk`'s weights; a checkpoint resumes only with the same one
        start: the fingerprint of the student's weights at step 0; a checkpoint resumes only with the same one
        adapter: the adapter for the last stage; needed if the recipe has `adapt_steps`
        ranks: the processes that train this student together; each has a trainer like this one, and rank 0 writes the files

    Raises:
        ConfigError: the adapter is missing, the model has too few positions for the recipe, or a step has too few
            sequences for the ranks.
    """

    def __init__(
        self, trunk: Trunk, student: Student, split: CorpusSplit, recipe: Recipe, folder: Path, base: str = "",
        start: str = "random weights", adapter: Adapter | None = None, ranks: Ranks = ALONE,
    ) -> None:  # fmt: skip
        if recipe.adapt_steps and adapter is None:
            raise ConfigError("the recipe has adapt_steps, but there is no adapter to train")
        if recipe.sequences_per_step < ranks.count:
            raise ConfigError(
                f"the recipe has {recipe.sequences_per_step} sequences a step, too few for {ranks.count} devices; "
                "raise sequences_per_step, or use fewer devices"
            )
        self._ranks = ranks
        self._trunk = trunk
        self.student = student
        self.adapter = adapter
        self._split = split
        self._recipe = recipe
        self._folder = folder
        self._length = min(recipe.max_length, trunk.config.max_positions)
        if self._length <= recipe.first_row:
            raise ConfigError(
                f"the model has {self._length} positions; lower the recipe's first_row ({recipe.first_row})"
            )
        info = student.info
        self._identity: dict[str, object] = {
            "recipe": json.loads(msgspec.json.encode(recipe)),
            "indexer": [info.num_heads, info.head_dim, info.rope_dim],
            "corpus": split.digest,
            "base model": base,
            "start": start,
        }
        self._device = next(iter(student.parameters.values())).device
        groups = [{"params": list(student.parameters.values())}]
        if adapter is not None:
            groups.append({"params": list(adapter.parameters.values())})
        self._optimiser = torch.optim.AdamW(
            groups, lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._generator = torch.Generator().manual_seed(recipe.seed)
        self._stopping = False
        self.step = 0

    def stop(self) -> None:
        """Make `run` save everything and return after the present step. With several ranks, rank 0 decides."""
        self._stopping = True

    def run(
        self, on_step: Callable[[StepLog], None] = lambda log: None, *, until: int | None = None,
        save_every: int = 50,
    ) -> None:  # fmt: skip
        """Train to the end of the recipe, or to step `until`. Steps are logged; every `save_every` the state is saved.

        Raises:
            ConfigError: the corpus has no suitable sequence, or the loss is not finite.
        """
        end = self._recipe.total_steps if until is None else min(until, self._recipe.total_steps)
        data = self._data()
        for _ in range(self.step * self._recipe.sequences_per_step):
            next(data)
        main = self._ranks.rank == 0
        if main:
            self._cut_log()
        with (self._folder / "log.jsonl" if main else Path(os.devnull)).open("ab") as log_file:
            stopping = self._all_stop()
            while self.step < end and not stopping:
                log = self._step(data)
                log_file.write(msgspec.json.encode(log) + b"\n")
                log_file.flush()
                on_step(log)
                self.step += 1
                stopping = self._all_stop()
                if main and (self.step % save_every == 0 or self.step == end or stopping):
                    self.save()

    def _all_stop(self) -> bool:
        """Whether rank 0 was told to stop. Every rank asks after the same step, so that none waits for one that has left."""
        asked = torch.tensor([float(self._stopping and self._ranks.rank == 0)], device=self._device)
        return bool(self._ranks.sum(asked).item())

    def _cut_log(self) -> None:
        """Delete the log's lines after the last checkpoint, which a killed run leaves: those steps run again."""
        path = self._folder / "log.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                log = msgspec.json.decode(line, type=StepLog)
            except msgspec.DecodeError:
                break  # the kill came in the middle of a line
            if log.step >= self.step:
                break
            kept.append(line)
        part = path.with_name(path.name + ".part")
        part.write_bytes(b"".join(kept))
        part.replace(path)

    def _data(self) -> Iterator[SequenceInfo]:
        r = self._recipe
        return self._split.shuffled(r.seed, r.min_length, r.shares, None if r.cut else r.max_length)

    def _step(self, data: Iterator[SequenceInfo]) -> StepLog:
        recipe, began = self._recipe, time.monotonic()
        stage, _, _ = recipe.stage(self.step)
        rate = recipe.rate(self.step)
        rates = (rate, recipe.adapter_rate(self.step))
        for group, own in zip(self._optimiser.param_groups, rates, strict=False):
            group["lr"] = own
        self._optimiser.zero_grad(set_to_none=True)
        layers = self._trunk.config.num_layers
        loss, recall, tokens, distance = torch.zeros(layers), torch.zeros(layers), 0, 0.0
        drawn = [self._draw(next(data), stage) for _ in range(recipe.sequences_per_step)]
        for own in shares([draw.length for draw in drawn], self._ranks.count)[self._ranks.rank]:
            draw = drawn[own]
            ids = self._split.tokens(draw.sequence, draw.length, self._device)
            if stage == "adapt":
                one_loss, one_recall, apart = self._adapt(ids, draw)
                distance += apart / recipe.sequences_per_step
            else:
                one_loss, one_recall = self._sequence(ids, draw, stage)
            loss += one_loss.cpu() / recipe.sequences_per_step
            recall += one_recall.cpu() / recipe.sequences_per_step
            tokens += draw.length
        if self._ranks.count > 1:
            parts = torch.cat((loss, recall, torch.tensor([tokens, distance])))
            whole = self._ranks.sum(parts.to(self._device)).cpu()
            loss, recall, rest = torch.split(whole, [layers, layers, 2])
            tokens, distance = int(rest[0]), float(rest[1])
        if not bool(loss.isfinite().all()):
            raise ConfigError(f"the loss of step {self.step} is not finite; lower the recipe's learning_rate")
        sum_gradients(list(self.parameters().values()), self._ranks)
        self._clip()
        self._optimiser.step()
        return StepLog(
            step=self.step, stage=stage, rate=rate, loss=loss.tolist(), recall=recall.tolist(), tokens=tokens,
            seconds=time.monotonic() - began, distance=distance if stage == "adapt" else None,
        )  # fmt: skip

    def _draw(self, sequence: SequenceInfo, stage: Stage) -> Portion:
        """Draw what a step does with a sequence. Every rank draws for all of them, and so draws the same."""
        recipe = self._recipe
        length = min(sequence.length, self._length)
        if stage == "adapt" or (stage == "sparse" and recipe.sparse_forward == "selected"):
            length = length // 8 * 8  # attention on a mask has fast kernels for such lengths only
        rows = sample_rows(
            sequence, length, recipe.rows, recipe.first_row, self._generator,
            share=recipe.focus_share, before=recipe.focus_before,
        )  # fmt: skip
        return Portion(sequence, length, rows, self._index_top_k())

    def _sequence(
        self, ids: Tensor, draw: Portion, stage: Literal["dense", "sparse"]
    ) -> tuple[Tensor, Tensor]:
        """Run every layer's loss backward on one sequence; return loss and recall, each [layers]."""
        trunk, recipe = self._trunk, self._recipe
        rows, index_top_k = draw.rows.to(self._device), draw.index_top_k
        losses, recalls = [], []
        probe = slice(None, None, max(1, len(rows) // RECALL_ROWS))
        with torch.no_grad():
            x = trunk.embed(ids)
        for layer in range(trunk.config.num_layers):
            with torch.no_grad():
                inputs = trunk.open(layer, x)
            allowed = inputs.visible(rows)
            with torch.no_grad():
                target = target_of(trunk, layer, inputs, rows, allowed, recipe.target)
            scores = self.student.scores(layer, inputs, rows)
            support = allowed
            if stage == "sparse" and recipe.sparse_support == "selected":
                support = top_mask(scores.detach(), allowed, index_top_k)
            loss = divergence(target, scores, support).mean()
            # Each layer's loss has its own graph, because its input is detached. Free the graph at once.
            torch.autograd.backward(loss / recipe.sequences_per_step)
            with torch.no_grad():
                recalls.append(
                    _recall(target[probe], scores.detach()[probe], allowed[probe], recipe.report_top_k)
                )
                losses.append(loss.detach())
                if stage == "dense" or recipe.sparse_forward == "dense":
                    attended = trunk.attend(inputs, slice(None), None)
                else:
                    attended = attend_selected(
                        trunk, layer, inputs, by_student(self.student, index_top_k), 1024
                    )
                x = trunk.close(layer, x, attended)
        return torch.stack(losses), torch.stack(recalls)

    def _index_top_k(self) -> int:
        choices = self._recipe.sparse_top_k
        return choices[int(torch.randint(len(choices), (1,), generator=self._generator))]

    def _adapt(self, ids: Tensor, draw: Portion) -> tuple[Tensor, Tensor, float]:
        """Run the adapter's and the indexers' losses backward on one sequence.

        Returns:
            the indexers' losses [layers], recall [layers], and the distance from dense in nats
        """
        recipe, adapter = self._recipe, self.adapter
        assert adapter is not None
        share = 1 / recipe.sequences_per_step
        answers = answer_rows(draw.sequence, draw.length).to(self._device)
        made = adapt(
            self._trunk, self.student, adapter, ids, draw.rows.to(self._device), draw.index_top_k, share, answers,
            recipe.target,
        )  # fmt: skip
        torch.autograd.backward((made.distance + recipe.answer_weight * made.answers) * share)
        return made.losses, made.recalls, float(made.distance.detach())

    def _clip(self) -> None:
        """Bound the gradient norm of each layer's indexer, and of the adapter, separately: they are separate problems."""
        if self.adapter is not None:
            torch.nn.utils.clip_grad_norm_(list(self.adapter.parameters.values()), self._recipe.clip)
        for layer in range(self._trunk.config.num_layers):
            own = [
                p for name, p in self.student.parameters.items() if name.startswith(f"model.layers.{layer}.")
            ]
            torch.nn.utils.clip_grad_norm_(own, self._recipe.clip)

    def parameters(self) -> dict[str, Tensor]:
        """Return all trained parameters, with the names that they have in an overlay."""
        return self.student.parameters | ({} if self.adapter is None else self.adapter.parameters)

    def save(self) -> None:
        """Write everything that `resume` needs. The file is replaced in one step, so it is never half written."""
        state = {
            "step": self.step,
            "identity": self._identity,
            "parameters": {name: p.detach().cpu() for name, p in self.parameters().items()},
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }
        part = self._folder / "checkpoint.pt.part"
        torch.save(state, part)
        part.replace(self._folder / "checkpoint.pt")

    def resume(self) -> bool:
        """Continue from the folder's checkpoint; return False if there is none.

        Raises:
            ConfigError: the checkpoint is damaged, or its recipe, indexer, corpus, base model or start differs.
        """
        path = self._folder / "checkpoint.pt"
        if not path.exists():
            return False
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            identity = state["identity"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise ConfigError(f"{path} is not a checkpoint of this trainer; use another folder") from None
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise ConfigError(
                    f"{path} was made with another {name}; use another folder, or the same {name}"
                )
        self.step = state["step"]
        self.student.load(state["parameters"])
        if self.adapter is not None:
            self.adapter.load(state["parameters"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])
        return True


def _recall(target: Tensor, scores: Tensor, allowed: Tensor, index_top_k: int) -> Tensor:
    """Return the attention on the best `index_top_k` positions, mean over rows.

    Ties are broken in any way: `top_mask` would make the host wait for the device.
    """
    best = scores.masked_fill(~allowed, -math.inf).topk(
        min(index_top_k, scores.shape[-1]), dim=-1, sorted=False
    )
    return target.gather(-1, best.indices).sum(-1).mean()
