"""A step costs little besides the model; `python -m benchmarks.step` prints the figures."""

from __future__ import annotations

import pytest
import torch

from benchmarks.step import measure


@pytest.mark.alone
def test_a_step_besides_the_model_takes_little_and_grows_little_with_streams() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # CPU time, and the best of three, because other work on the machine only adds time.
        one, many = (min(measure(n, 512, "greedy", 30).step for _ in range(3)) for n in (1, 17))
    finally:
        torch.set_num_threads(threads)
    print(f"{one * 1e6:.0f} us, {(many - one) / 16 * 1e6:.0f} us more a stream")
    assert one < 0.7e-3
    assert (many - one) / 16 < 0.1e-3
