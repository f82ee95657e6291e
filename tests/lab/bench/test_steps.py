"""The engine driven in process: what it counts, the figures computed from that, and the command itself."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from engine.checkpoint.source import open_source
from engine.errors import EngineError
from lab.bench.steps import Step, StepsReport, drive, main, report, spread, submits
from tests.engine.kit import VOCAB, Lab, random_overlay, tiny_checkpoint


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(folder)
    return folder, random_overlay(folder / "overlay.safetensors", open_source(folder))


def test_every_token_is_counted_and_the_parts_of_a_step_are_within_it(tiny: tuple[Path, Path]) -> None:
    lab = Lab(*tiny)
    requests = submits(3, 70, 6, 64, VOCAB)
    assert len({request.prompt_token_ids[0] for request in requests}) == 3
    steps = drive(lab.built.core, requests, lambda: lab.built.runner.model_seconds)
    assert sum(count for step in steps for _, count in step.tokens) == 18
    assert sum(step.rows for step in steps) == 3 * (70 + 5)  # the last token is never computed
    assert all(0 < step.model_seconds < step.seconds for step in steps)
    again = drive(lab.built.core, requests, lambda: lab.built.runner.model_seconds)
    assert sum(step.rows for step in again) == 3 * (70 - 64 + 5)  # a page of each was cached
    one = report(steps, again, requests, 1, 7)
    assert (one.decode_steps, one.decode_streams) == (5, 3)
    # Of an odd number of steps, more than half reach the median of each part, so some step reaches both.
    assert one.model.p50 + one.outside.p50 <= one.decode_step.max
    assert one.tokens_per_second == pytest.approx(18 / one.seconds)


def test_statistics_of_known_times() -> None:
    requests = submits(2, 10, 3, None, VOCAB)
    a, b = (request.request_id for request in requests)
    steps = [
        Step(1.0, 1.0, 0.75, 10, ((a, 1),)),
        Step(3.0, 2.0, 1.0, 11, ((a, 1), (b, 1))),  # with a prompt: no decode step
        Step(3.5, 0.5, 0.25, 2, ((a, 1), (b, 1))),
        Step(4.0, 0.5, 0.375, 1, ((b, 1),)),  # one stream only
    ]
    one = report(steps, steps[1:], requests, 4, 9)
    assert (one.decode_steps, one.decode_streams, one.decode_tokens_per_second) == (1, 2, 4.0)
    assert (one.model.p50, one.outside.p50) == (0.25, 0.25)
    assert (one.first_token.p50, one.first_token.max) == (3.0, 3.0)
    assert (one.between_tokens.p50, one.between_tokens.p99) == (0.5, 2.0)
    assert one.starvation == 4.0
    assert (one.tokens_per_second, one.threads, one.peak_rss_bytes) == (6 / 4, 4, 9)


def test_the_percentile_is_the_nearest_rank() -> None:
    assert spread([float(n) for n in range(1, 101)]).p99 == 99.0
    assert spread([float(n) for n in range(1, 201)]).p99 == 198.0
    assert spread([]).max == 0.0


def test_a_request_that_cannot_run_is_an_error(tiny: tuple[Path, Path]) -> None:
    lab = Lab(*tiny)
    with pytest.raises(EngineError, match="max_model_len is 640"):
        drive(lab.built.core, submits(1, 640, 1, None, VOCAB), lambda: 0.0)


def test_the_command_prints_one_line_of_json(
    tiny: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--weights", str(tiny[0]), "--overlay", str(tiny[1]), "--kv-cache-bytes", str(64 << 20)]
    main([*flags, "--streams", "2", "--context", "80", "--tokens", "4"])
    (line,) = capsys.readouterr().out.splitlines()
    one = msgspec.convert(json.loads(line), StepsReport)
    assert (one.streams, one.context, one.tokens, one.top_k) == (2, 80, 4, 64)
    assert one.peak_rss_bytes > 50 << 20
    with pytest.raises(SystemExit):
        main([*flags, "--top-k", "many"])
    assert "--top-k must be a number of tokens or dense, not 'many'" in capsys.readouterr().err
