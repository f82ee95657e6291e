"""Runs the engine in its own process and restarts it when it dies.

If the engine dies, every request that waits for it gets an error at once, and a new process starts by
itself. An engine that hangs is killed (`engine.watchdog`), and then it has died. If the engine reports that it cannot
start, it is not started again: it would fail again. If the system cannot start a process, it is tried again and again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress

import msgspec

from engine.channel import ServerEnd
from engine.client import EngineState, EngineStatus, Hear, Settled
from engine.config import EngineConfig
from engine.errors import EngineDiedError, EngineUnavailableError, ProtocolError
from engine.protocol import (
    Abort,
    EngineStats,
    Failed,
    Loading,
    Ready,
    RequestUsage,
    Start,
    StepOutput,
    Stop,
    Submit,
    Vocabulary,
    Work,
    add_counters,
)
from engine.pulse import Pulse
from engine.watchdog import Watchdog

_log = logging.getLogger(__name__)

# OpenMP's threads spin while they wait, each on a core. If another process needs that core (the server
# does), a step takes many times as long as with threads that sleep. Without other processes spinning gains little.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
_STOP_SECONDS = 5.0  # time for the current step to end before the process is killed
_BACKOFF_SECONDS = (0.0, 0.5, 1.0, 2.0, 5.0)  # the wait after n failed starts in a row
_OUTPUT_BYTES = 1 << 16
_OUTPUT_SECONDS = 1.0
_QUIET_SECONDS = 5.0  # a shorter pause is not worth a word in the status
_MAX_FAILED_STARTS = len(_BACKOFF_SECONDS)


class SubprocessEngine:
    """An `engine.client.Engine` over `python -m engine.step.process`.

    Args:
        config: what to load and how to run.
        on_output: called with the text that the process writes to its standard output and error, a few whole
            lines at a time; None lets the process write to the server's own output.
        vocabulary: the tokenizer's, for grammars; None: requests cannot have one.
        module: the program to run; measurements replace it by one that speaks the same messages.
        hang_seconds: an engine that makes no progress for so long is replaced; 0: never.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_output: Callable[[str], None] | None = None,
        *,
        vocabulary: Vocabulary | None = None,
        module: str = "engine.step.process",
        hang_seconds: float = 0.0,
    ) -> None:
        self._config = config
        self._vocabulary = vocabulary
        self._module = module
        self._on_output = on_output
        self._hang_seconds = hang_seconds
        self._watchdog: Watchdog | None = None
        self._fault: str | None = None  # why the last process was killed, if it hung
        self._status = EngineStatus(state=EngineState.STARTING, message="the engine has not been started yet")
        self._supervisor: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._end: ServerEnd | None = None
        self._was_ready = False  # whether the current process was ready at some time
        self._held: dict[str, _Held] = {}  # requests that the engine has not released

    @property
    def status(self) -> EngineStatus:
        """The newest snapshot of the engine."""
        watchdog = self._watchdog
        if watchdog is not None and watchdog.quiet > _QUIET_SECONDS:
            return msgspec.structs.replace(self._status, quiet_seconds=watchdog.quiet)
        return self._status

    async def start(self) -> None:
        """Start the process and the task that watches it."""
        if self._supervisor is None:
            self._set(EngineState.STARTING, "the engine is starting")
            self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def stop(self) -> None:
        """End the engine: running requests get their `abort`, then the process exits or is killed."""
        if self._status.state is EngineState.STOPPED:
            return
        runs = self._status.state is EngineState.READY
        self._set(EngineState.STOPPED, "the engine was stopped")
        if not runs:
            self._kill()  # it has nothing to finish, and would read a message only after it has loaded
        elif self._end is not None:
            self._end.send(Stop())
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_SECONDS)
            except TimeoutError:
                self._kill()
        if self._supervisor is not None:
            with suppress(TimeoutError, asyncio.CancelledError):
                await asyncio.wait_for(self._supervisor, _STOP_SECONDS)
        self._fail_streams()

    def submit(self, request: Submit, hear: Hear, settled: Settled | None = None) -> None:
        """Run one request, as `engine.client.Engine.submit` describes."""
        if self._status.state is not EngineState.READY or self._end is None:
            if settled is not None:
                settled(request.request_id, None)
            raise EngineUnavailableError(self._status.message or "the engine is not ready")
        self._held[request.request_id] = _Held(request, hear, settled)
        self._end.send(request)

    def abort(self, request_id: str) -> None:
        """End a request, as `engine.client.Engine.abort` describes."""
        held = self._held.get(request_id)
        if held is None or held.hear is None:
            return
        held.hear = None
        if self._end is not None:
            self._end.send(Abort(request_id=request_id))

    async def _supervise(self) -> None:
        """Start the process, watch it until its end, and start it again."""
        failed_starts = 0
        while not self._over:
            await asyncio.sleep(_BACKOFF_SECONDS[min(failed_starts, len(_BACKOFF_SECONDS) - 1)])
            if self._over:
                break
            self._fault, was_ready, spawned = None, False, False
            try:
                was_ready, code = await self._run_once()
                spawned = True
                how = f"signal {-code}" if code < 0 else f"exit code {code}"
                ended = self._fault or f"the engine process ended with {how}"
            except Exception as error:  # most likely the system has no process or no descriptor left
                ended = f"the engine process could not be started ({error})"
                if not isinstance(error, OSError):
                    _log.error("%s", ended, exc_info=error)
            self._status = msgspec.structs.replace(
                self._status,
                stats=EngineStats(),
                ended=add_counters(self._status.ended, self._status.stats),
                hangs=self._status.hangs + (self._fault is not None),
            )
            self._fail_streams()
            if self._over:
                break
            failed_starts = 0 if was_ready else failed_starts + 1
            # A server that has served waits for as long as the system has no process or descriptor for it.
            waits = not spawned and self._status.model is not None
            if failed_starts >= _MAX_FAILED_STARTS and not waits:
                message = f"{failed_starts} starts of the engine failed in a row; at last, {ended}"
                self._set(EngineState.FAILED, message)
            else:
                message = f"{ended}; a new one is starting"
                _log.error("%s", message)
                self._set(EngineState.DOWN, message, restarts=self._status.restarts + 1)

    async def _run_once(self) -> tuple[bool, int]:
        """Run one process until its end. Return (whether it became ready, its exit status: -n for signal n).

        Raises:
            OSError: the system cannot start a process.
        """
        with ExitStack() as stack:
            pulse = stack.enter_context(closing(Pulse.create())) if self._hang_seconds else None
            process, ours = await self._spawn(pulse)
            self._process = process
            output = asyncio.create_task(self._pass_on(process.stdout), name="engine output")
            if self._over:
                self._kill()  # `stop` was called while the process was being started
            self._was_ready = False
            if pulse is not None:
                self._watchdog = stack.enter_context(closing(self._watch(process.pid, pulse)))
            try:
                end = self._end = await ServerEnd.over(ours, self._hear)
                self._status = msgspec.structs.replace(self._status, pid=process.pid)
                stack.callback(end.close)
                end.send(Start(config=self._config, vocabulary=self._vocabulary))
                await end.wait_closed()
            except ProtocolError as error:
                _log.error("%s; the engine is replaced", error)
            finally:
                if self._end is not None:
                    self._end.close()
                    self._end = None
                if process.returncode is None:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
                if self._watchdog is not None:
                    self._watchdog.close()
                    self._fault, self._watchdog = self._watchdog.fault, None
                self._kill()
                code = await process.wait()
                self._process = None
                # The process's last output is logged before the next process starts. Its children may outlive it and
                # keep the pipe open, so the wait has a limit.
                with suppress(TimeoutError):
                    await asyncio.wait_for(output, _OUTPUT_SECONDS)
        return self._was_ready, code

    async def _spawn(self, pulse: Pulse | None) -> tuple[asyncio.subprocess.Process, socket.socket]:
        """Start a process; return it and our end of the socket to it."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                arguments, files = ["--fd", str(theirs.fileno())], [theirs.fileno()]
                if pulse is not None:
                    arguments += ["--pulse", str(pulse.fileno())]
                    files.append(pulse.fileno())
                # The process has its own session, so Ctrl-C in the terminal reaches only the server, which decides.
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-P",  # the current folder may have an `engine` of its own
                    "-m",
                    self._module,
                    *arguments,
                    pass_fds=files,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=None if self._on_output is None else asyncio.subprocess.PIPE,
                    stderr=None if self._on_output is None else asyncio.subprocess.STDOUT,
                    env=_ENVIRONMENT | os.environ,
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    def _watch(self, pid: int, pulse: Pulse) -> Watchdog:
        def about() -> str:
            requests = "1 request" if len(self._held) == 1 else f"{len(self._held)} requests"
            return f"{requests}, {self._status.stats.steps_total} steps, {pulse.count} beats"

        return Watchdog(
            pid,
            pulse,
            self._hang_seconds,
            loading=lambda: not self._was_ready,
            on_cpu=lambda: self._status.model is not None and self._status.model.device.startswith("cpu"),
            about=about,
        )

    async def _pass_on(self, stream: asyncio.StreamReader | None) -> None:
        """Pass the process's output to `on_output` until it ends, in pieces that end with a line."""
        if stream is None or self._on_output is None:
            return
        rest = b""
        while data := await stream.read(_OUTPUT_BYTES):
            whole, newline, rest = (rest + data).rpartition(b"\n")
            if newline:
                self._on_output(whole.decode("utf-8", "replace"))
            elif len(rest) >= _OUTPUT_BYTES:  # no line is that long
                self._on_output(rest.decode("utf-8", "replace"))
                rest = b""
        if rest:
            self._on_output(rest.decode("utf-8", "replace"))

    def _hear(self, message: Loading | Ready | Failed | StepOutput) -> None:
        if isinstance(message, StepOutput):
            if message.stats is not None:
                self._status = msgspec.structs.replace(self._status, stats=message.stats)
            for request_id, work in message.progress:
                if (held := self._held.get(request_id)) is not None:
                    held.work = work
            all_held = self._held
            for delta in message.deltas:  # this loop sees every token of every stream
                if (held := all_held.get(delta.request_id)) is None:
                    continue
                held.tokens += len(delta.token_ids)
                if delta.usage is not None:
                    held.usage, held.work = delta.usage, delta.usage.work
                if delta.finish_reason is not None:
                    del all_held[delta.request_id]
                if (
                    held.hear is not None
                ):  # None: the server has aborted it, and the engine had not read the abort
                    held.hear(delta)
                if delta.finish_reason is not None:
                    held.settle()
        elif isinstance(message, Loading):
            if self._status.state is not EngineState.STOPPED:
                self._status = msgspec.structs.replace(
                    self._status, loading=message, message=f"the engine is starting: {message.stage}"
                )
        elif isinstance(message, Ready):
            self._was_ready = True
            if self._status.state is not EngineState.STOPPED:
                self._set(EngineState.READY, "", model=message.model, capacity=message.capacity, loading=None)
        elif self._status.state is EngineState.READY:
            _log.error("the engine ends: %s", message.message)
        else:
            self._set(EngineState.FAILED, message.message)

    @property
    def _over(self) -> bool:
        return self._status.state in (EngineState.STOPPED, EngineState.FAILED)

    def _set(self, state: EngineState, message: str, **changes: object) -> None:
        self._status = msgspec.structs.replace(self._status, state=state, message=message, **changes)

    def _fail_streams(self) -> None:
        after = "the server is stopping" if self._over else "a new one is starting, so try again"
        what = self._fault or "the engine process ended"
        while self._held:
            held = self._held.popitem()[1]
            if held.hear is not None:
                held.hear(EngineDiedError(f"{what} while this request was running; {after}"))
            held.settle()

    def _kill(self) -> None:
        """Kill the process and the ranks that it has started, which may be stopped and see no end of a stream."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


class _Held:
    """A request that the engine has not released, and its known usage."""

    __slots__ = ("_request", "_settled", "hear", "tokens", "usage", "work")

    def __init__(self, request: Submit, hear: Hear, settled: Settled | None) -> None:
        self._request = request
        self._settled = settled
        self.hear: Hear | None = hear  # None: the server wants to hear no more
        self.usage: RequestUsage | None = None
        self.tokens = 0
        self.work = Work()

    def settle(self) -> None:
        if self._settled is None:
            return
        usage = self.usage or RequestUsage(
            prompt_tokens=len(self._request.prompt_token_ids),
            cached_tokens=0,
            completion_tokens=0,
            preemptions=0,
            index_top_k=self._request.index_top_k,
            queue_seconds=0.0,
            prefill_seconds=0.0,
            decode_seconds=0.0,
        )
        usage = msgspec.structs.replace(usage, completion_tokens=self.tokens, work=self.work)
        self._settled(self._request.request_id, usage)
