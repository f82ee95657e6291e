"""An engine process without a model, run by `test_watchdog.py`. What it does with a request, its first token id says."""

from __future__ import annotations

import argparse
import socket
import threading
import time

from engine.channel import EngineEnd
from engine.pdeath import die_with_parent
from engine.protocol import Capacity, Delta, ModelInfo, Ready, StepOutput, Stop, Submit
from engine.pulse import Pulse

ANSWER, DEADLOCK, LONG, BUSY = 1, 2, 3, 4


def main() -> None:
    """Answer requests until the server has gone."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int)
    parser.add_argument("--pulse", type=int)
    arguments = parser.parse_args()
    die_with_parent()
    pulse = Pulse(arguments.pulse)
    pulse.dump_on_signal()
    end = EngineEnd(socket.socket(fileno=arguments.fd))
    end.receive()
    model = ModelInfo(
        architecture="none", num_layers=1, num_parameters=0, vocab_size=10, max_model_len=100, device="cpu",
        dtype="none", indexer=None,
    )  # fmt: skip
    capacity = Capacity(num_pages=1, page_size=64, page_bytes=1, token_budget=1, max_running=1)
    pulse.beat()
    end.send(Ready(model=model, capacity=capacity))
    threading.Thread(target=_beat_idle, args=(pulse,), daemon=True).start()
    while (message := end.receive()) is not None and not isinstance(message, Stop):
        if isinstance(message, Submit):
            _working.set()
            _work(message.prompt_token_ids[0], pulse)
            _working.clear()
            end.send(StepOutput(deltas=(Delta(request_id=message.request_id, finish_reason="stop"),)))


_working = threading.Event()


def _beat_idle(pulse: Pulse) -> None:
    while True:
        time.sleep(0.05)
        if not _working.is_set():
            pulse.beat()


def _work(kind: int, pulse: Pulse) -> None:
    began = time.monotonic()
    if kind == DEADLOCK:
        lock = threading.Lock()
        lock.acquire()
        _waits_for_ever(lock)
    while kind == LONG and time.monotonic() - began < 3:
        time.sleep(0.1)
        pulse.beat()
    while kind == BUSY and time.monotonic() - began < 3:
        pass


def _waits_for_ever(lock: threading.Lock) -> None:
    lock.acquire()


if __name__ == "__main__":
    main()
