"""The engine process: `python -m engine.step.process --fd N`, where N is an inherited stream socket to the server.

The process ends when the server ends (it sees the end of the stream), when it is told to stop, or when it can no
longer compute. It ignores signals: only the server handles Ctrl-C, and decides which requests still finish. If the server
is killed while this process is stopped, the system kills it (`PR_SET_PDEATHSIG`, on Linux).
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engine.channel import EngineEnd
from engine.errors import EngineError, ProtocolError, RankError
from engine.pdeath import die_with_parent
from engine.protocol import Abort, Delta, Failed, Loading, Start, Stop, Submit, ToEngine
from engine.pulse import Pulse
from engine.step.build import Built, build
from engine.step.grammars import Compiled
from engine.step.profiler import StepProfiler

_log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 0.1
_IDLE_SECONDS = 1.0  # between two beats of an engine that has nothing to do


def main() -> None:
    """Read `Start`, load, then serve until the end."""
    parser = argparse.ArgumentParser(description="The engine process. Started by the server, not by hand.")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the socket to the server")
    parser.add_argument("--pulse", type=int, help="file descriptor of the counter of progress")
    arguments = parser.parse_args()
    die_with_parent()
    pulse = None if arguments.pulse is None else Pulse(arguments.pulse)
    if pulse is not None:
        pulse.dump_on_signal()
    beat = _nothing if pulse is None else pulse.beat
    beat()
    end = EngineEnd(socket.socket(fileno=arguments.fd))
    logging.basicConfig(format="engine: %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    first = end.receive()
    if first is None:
        return
    if not isinstance(first, Start):
        raise ProtocolError(f"the first message must be Start, not {type(first).__name__}")
    inbox: queue.SimpleQueue[ToEngine | Compiled] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(end, inbox), daemon=True).start()
    try:
        profiler = StepProfiler.of(first.config)
        built = build(
            first.config, _Progress(end, beat), lambda reason: _give_up(end, reason), first.vocabulary
        )
    except EngineError as error:
        end.send(Failed(message=str(error)))
        sys.exit(1)
    if built.unused_tensors:
        names = ", ".join(built.unused_tensors[:5])
        _log.warning("%d tensors of the checkpoint were not used: %s ...", len(built.unused_tensors), names)
    if built.weights.fp8_bytes or built.weights.dequantised_bytes:
        _log.info("%s", built.weights)
    if built.ready.model.random_weights:
        _log.warning(
            "the weights are random (load_format dummy): speed can be measured, and answers mean nothing"
        )
    _log.info("%s", built.kernels)
    gc.collect()
    gc.freeze()  # what is loaded stays; a collection in the middle of a step then looks at young objects only
    beat()
    end.send(built.ready)
    try:
        _loop(end, inbox, built, profiler, beat)
    except RankError as error:
        _log.error("%s", error)
        end.send(Failed(message=str(error)))
        built.close()
        os._exit(1)  # a normal exit would wait for the device, which may wait for a rank that is gone
    if profiler is not None:
        profiler.close()
    built.close()
    if built.team is not None:
        os._exit(0)  # in a normal exit NCCL would wait for ranks that have ended


def _give_up(end: EngineEnd, reason: str) -> None:
    """Report a failure and end the process at once, from any thread. The main thread may wait for a lost rank."""
    with suppress(OSError):
        end.send(Failed(message=reason))
    os._exit(1)


class _Progress:
    """Sends progress to the server, at most a few times a second and always at the end of a stage."""

    def __init__(self, end: EngineEnd, beat: Callable[[], None]) -> None:
        self._end = end
        self._beat = beat
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._beat()
        now = time.monotonic()
        if done >= total or now - self._last > _PROGRESS_SECONDS:
            self._last = now
            self._end.send(Loading(stage=stage, done=done, total=total))


def _read(end: EngineEnd, inbox: queue.SimpleQueue[ToEngine | Compiled]) -> None:
    """Put the server's messages into the inbox; ends the process when the server is gone. Runs in a thread."""
    while True:
        try:
            message = end.receive()
        except ProtocolError as error:
            _log.error("%s", error)
            os._exit(2)
        if message is None:
            os._exit(0)
        inbox.put(message)


def _nothing() -> None:
    """Count no progress: nobody asked for it."""


def _loop(
    end: EngineEnd,
    inbox: queue.SimpleQueue[ToEngine | Compiled],
    built: Built,
    profiler: StepProfiler | None,
    beat: Callable[[], None] = _nothing,
) -> None:
    core = built.core
    core.compile_apart(inbox.put)
    step = core.step if profiler is None else profiler.around(core.step)
    while True:
        deltas: list[Delta] = []
        changed = False
        while not core.has_work or not inbox.empty():
            if changed and not core.has_work and inbox.empty():
                break  # report what changed before the wait
            try:
                message = inbox.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                beat()  # there is nothing to do
                continue
            changed = True
            if isinstance(message, Submit):
                deltas.extend(core.submit(message))
            elif isinstance(message, Abort):
                deltas.extend(core.abort(message.request_id))
            elif isinstance(message, Compiled):
                deltas.extend(core.compiled(message))
            elif isinstance(message, Stop):
                deltas.extend(core.abort_all())
                end.send(core.tell(tuple(deltas)))
                return
            else:
                raise ProtocolError(f"{type(message).__name__} came while the engine was running")
        if changed:
            end.send(core.tell(tuple(deltas)))
        output = step()
        if output is not None:
            beat()
            end.send(output)
        if core.broken:
            end.send(Failed(message="several steps in a row failed; the device may be broken"))
            sys.exit(1)


if __name__ == "__main__":
    main()
