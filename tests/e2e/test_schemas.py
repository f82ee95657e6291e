"""What `tests.e2e.schemas` calls a fault, and a short run of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.schemas import HANG_SECONDS, judge
from tests.kit import ROOT


@pytest.mark.parametrize(
    ("path", "status", "keys", "wrong_key", "faults"),
    [
        ("/v1/completions", 200, False, False, 0),
        ("/v1/completions", 400, True, False, 0),
        ("/v1/completions", 500, False, False, 1),
        ("/v1/completions", 401, True, True, 0),
        ("/v1/completions", 400, True, True, 1),  # it was read, though nobody knows the caller
        ("/health/live", 200, True, True, 0),
        ("/admin/settings", 403, False, False, 0),
        ("/admin/settings", 403, True, False, 0),
        ("/admin/settings", 200, True, False, 1),
        ("/admin/settings", 400, False, False, 1),
        ("/admin/settings", 403, True, True, 1),
    ],
)
def test_what_is_a_fault(path: str, status: int, keys: bool, wrong_key: bool, faults: int) -> None:
    assert len(judge(path, status, 0.1, "{}", keys=keys, wrong_key=wrong_key)) == faults


def test_a_late_answer_and_a_stream_that_fails_are_faults() -> None:
    failed = 'data: {"error":{"message":"x","type":"engine_error"}}'
    assert judge("/v1/completions", 200, HANG_SECONDS + 1, "{}", keys=False, wrong_key=False)
    assert judge("/v1/completions", 200, 0.1, failed, keys=False, wrong_key=False)
    late = failed.replace("engine_error", "timeout_error")
    assert not judge("/v1/completions", 200, 0.1, late, keys=False, wrong_key=False)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_hundred_cases_meet_no_fault(default_model: Path) -> None:
    pytest.importorskip("schemathesis", reason="install the extra `fuzz`")
    command = [sys.executable, "-P", "-m", "tests.e2e.schemas", "--cases=300", "--workers=2"]
    path = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )  # `-P` leaves the folder out
    own = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
