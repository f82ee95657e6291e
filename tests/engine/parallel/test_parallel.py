"""One model over two processes: the numbers are those of one process, each has half of the weights, deaths are seen."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint.loader import load
from engine.checkpoint.source import open_source
from engine.config import EngineConfig
from engine.errors import ConfigError, RankError
from engine.models.mla.config import MlaConfig
from engine.models.mla.model import MlaModel
from engine.models.mla.weights import weight_table
from engine.parallel.ranks import ALONE, Ranks
from engine.plan.types import ScheduledRequest, StepPlan
from engine.protocol import SamplingParams, Submit
from engine.step.build import Built, build, resolve_device
from lab.inspect.report import Devices, Wanted, inspect
from tests.engine.checkpoint.test_fp8 import quantise_folder
from tests.engine.kit import tiny_checkpoint
from tests.engine.models.mla.kit import VOCAB, tiny_deepseek
from tests.engine.models.mla.test_mtp import Tiny

pytestmark = pytest.mark.process

LENGTHS = {"a": (150, 24), "b": (70, 9), "c": (131, None), "d": (64, 40), "e": (1, 24)}  # prompt, index_top_k


def config_of(folder: Path, count: int, **settings: Any) -> EngineConfig:
    return EngineConfig(
        weights=str(folder), dtype="float32", device="cpu", kv_cache_bytes=32 << 20, threads=1,
        tensor_parallel=count, token_budget=100, max_running=8, **settings,
    )  # fmt: skip


def prompt(name: str, length: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(ord(name))
    return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("v32")
    tiny_deepseek("deepseek_v32", path)
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Built, Built]]:
    """The same checkpoint over one process and over two."""
    two = build(config_of(folder, 2))
    yield build(config_of(folder, 1)), two
    two.close()


def greedy(built: Built) -> dict[str, tuple[int, ...]]:
    """A mixed crowd through the scheduler: chunked prompts, several index_top_k, 12 tokens each."""
    made: dict[str, tuple[int, ...]] = {}
    for name, (length, index_top_k) in LENGTHS.items():
        sampling = SamplingParams(max_tokens=12, seed=0, temperature=0.0)
        request = Submit(
            request_id=name, prompt_token_ids=prompt(name, length), sampling=sampling, index_top_k=index_top_k
        )
        assert built.core.submit(request) == ()
    while built.core.has_work:
        output = built.core.step()
        assert output is not None
        for delta in output.deltas:
            assert delta.error is None
            made[delta.request_id] = made.get(delta.request_id, ()) + delta.token_ids
    return made


def test_two_ranks_give_the_logits_of_one(pair: tuple[Built, Built]) -> None:
    first_page = 0
    requests = []
    for name, (length, index_top_k) in LENGTHS.items():
        pages = tuple(range(first_page, first_page + 3))
        first_page += 3
        requests.append(
            ScheduledRequest(
                request_id=name,
                token_ids=prompt(name, length),
                start=0,
                page_ids=pages,
                index_top_k=index_top_k,
                sample=None,
            )
        )
    plan = StepPlan(requests=tuple(requests))
    one, two = (built.runner._model.logits(built.runner.hidden(plan)) for built in pair)
    assert float((one - two).abs().max() / one.abs().max()) < 1e-5
    models = [built.runner._model for built in pair]
    heads = [model.layers[0].attention.num_heads for model in models if isinstance(model, MlaModel)]
    assert heads == [4, 2]


def test_two_ranks_draw_the_tokens_of_one(pair: tuple[Built, Built]) -> None:
    one, two = (greedy(built) for built in pair)
    assert one == two
    assert {len(tokens) for tokens in one.values()} == {12}


def test_each_rank_loads_its_half(folder: Path, pair: tuple[Built, Built]) -> None:
    source = open_source(folder)
    config = MlaConfig.read(source.config, "config.json")
    whole, first, second = (weight_table(config, ranks) for ranks in (ALONE, Ranks(0, 2), Ranks(1, 2)))
    split = {
        name for name, weight in whole.items() if second.get(name, weight).held_shape != weight.held_shape
    }
    assert {name.partition(".")[2].partition(".")[2] for name in split} == {
        "attn.q_b", "attn.kv_b", "attn.o", "mlp.gate_up", "mlp.down", "moe.experts_gate_up",
        "moe.experts_down", "moe.shared_gate_up", "moe.shared_down",
    }  # fmt: skip
    sizes = {name: 4 * math.prod(weight.shape) for name, weight in whole.items()}
    halves = sum(sizes[name] for name in split) // 2
    rest = sum(size for name, size in sizes.items() if name not in split)
    team = pair[1].team
    assert team is not None
    assert team.loaded == {1: halves + rest - sizes["head"]}
    assert halves > rest  # so that the figure above is about half of the whole
    assert set(whole) == set(first) == set(second) | {"head"}
    # Together the ranks hold what one alone does.
    alone, left, right = (
        load(table, source, dtype=torch.float32, device=torch.device("cpu"))[0]
        for table in (whole, first, second)
    )
    for name in split:
        dim = 1 if name.endswith(("attn.o", "mlp.down", "shared_down")) else 0
        # What is made of a gate and an up matrix has half of each.
        parts = (
            x.chunk(2) if "gate_up" in name and "experts" not in name else (x,)
            for x in (left[name], right[name])
        )
        joined = torch.cat([torch.cat(both, dim) for both in zip(*parts, strict=True)])
        assert torch.equal(joined, alone[name]), name
    assert pair[0].ready.model == pair[1].ready.model
    # What inspection says that the first device needs is what it took.
    report = inspect(folder, None, Wanted(128, 1, "float32", "auto"), Devices(2, 1 << 30))
    assert report["fit"]["needed_bytes"] - report["cache"]["bytes"] == pair[1].weights.num_bytes


def test_a_killed_worker_ends_the_engine_with_the_reason(pair: tuple[Built, Built]) -> None:
    """This is the last test of `pair`, because it ends the processes."""
    built = pair[1]
    assert built.team is not None
    sampling = SamplingParams(max_tokens=100, seed=0, temperature=0.0)
    built.core.submit(Submit(request_id="z", prompt_token_ids=(1, 2, 3), sampling=sampling, index_top_k=24))
    built.core.step()
    built.team.crew.processes[0].kill()
    killed = time.monotonic()
    with pytest.raises(RankError, match="^rank 1 of 2 failed: it was ended by signal 9$"):
        built.core.step()
    assert time.monotonic() - killed < 5
    built.close()


@pytest.mark.slow
def test_what_is_wrong_with_a_workers_part_is_told(tmp_path: Path) -> None:
    tiny_deepseek("deepseek_v32", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.15.up_proj.weight"  # rank 1 reads it, rank 0 does not
    tensors[name][0, 0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RankError, match=rf"^rank 1 of 2 failed: .* NaN or infinite values in tensor {name}"):
        build(config_of(tmp_path, 2))


@pytest.mark.slow
def test_weights_in_fp8_stay_so_in_parts(tmp_path: Path) -> None:
    """A rank's part of the shared expert's 128 inner dims is half a block: only these weights become plain."""
    tiny_deepseek(
        "deepseek_v32", tmp_path, hidden_size=256, intermediate_size=256, moe_intermediate_size=128,
        q_lora_rank=128, kv_lora_rank=128, qk_nope_head_dim=48, qk_rope_head_dim=16, v_head_dim=64,
        index_head_dim=32,
    )  # fmt: skip
    quantise_folder(tmp_path)
    texts, plain = [], []
    for count in (1, 2):
        built = build(
            config_of(tmp_path, count, weight_dtype="fp8", kv_cache_dtype="bf16", indexer_dtype="bf16")
        )
        texts.append(greedy(built))
        plain.append(built.weights.dequantised_bytes)
        built.close()
    assert texts[0] == texts[1]
    kv_b, shared = 4 * 3 * 4 * (48 + 64) * 128, 4 * 2 * 3 * 128 * 256  # bytes of all layers, in float32
    assert plain[1] - plain[0] == shared // 2 - kv_b // 2


@pytest.mark.slow
def test_a_draft_layer_guesses_on_rank_0(tmp_path: Path) -> None:
    folder = Tiny(tmp_path).folder
    texts = []
    for count, drafting in ((1, {}), (2, {"drafter": "mtp", "speculative_tokens": 2})):
        built = build(config_of(folder, count, **drafting))
        texts.append(greedy(built))
        built.close()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("count", "changes", "message"),
    [
        (3, {}, "the model's 4 attention heads cannot be split evenly over 3 devices"),
        (4, {"n_routed_experts": 6, "n_group": 2}, "the model's 6 routed experts cannot"),
        (4, {"moe_intermediate_size": 22}, "the model's 22 inner dims of the shared expert cannot"),
        (4, {"intermediate_size": 94}, "the model's 94 inner dims of an MLP cannot"),
    ],
)
def test_what_does_not_divide_is_refused(
    tmp_path: Path, count: int, changes: dict[str, Any], message: str
) -> None:
    tiny_deepseek("deepseek_v32", tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        build(config_of(tmp_path, count))


def test_an_architecture_that_is_not_split_is_refused(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="llama models are served on one device, not on 2"):
        build(config_of(tmp_path, 2))


def test_ranks_need_a_device_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert resolve_device("auto", 3, 4) == resolve_device("cuda", 3, 4) == torch.device("cuda:3")
    with pytest.raises(ConfigError, match="tensor_parallel is 5, but torch sees 4 CUDA devices"):
        resolve_device("cuda", 0, 5)
    with pytest.raises(ConfigError, match="'cuda:1' is one device, but tensor_parallel is 4"):
        resolve_device("cuda:1", 0, 4)
