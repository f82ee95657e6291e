"""Traces of steps by `torch.profiler`, for Perfetto (ui.perfetto.dev) or chrome://tracing.

A trace begins after so many steps, when caches are warm, and again whenever the file `start` appears in the folder.
A server without a folder for traces has no `StepProfiler` at all, so its steps are as they were.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.config import EngineConfig
from engine.errors import ConfigError

_log = logging.getLogger(__name__)

TRIGGER = "start"
"""A file of this name in the folder begins a trace at the next step. The profiler removes it."""

T = TypeVar("T")


class StepProfiler:
    """Traces `steps` steps of one engine, the first time after `after` steps, into files of one folder."""

    def __init__(self, folder: Path, after: int, steps: int) -> None:
        """Make the folder if it is missing.

        Raises:
            ConfigError: the folder cannot be made or written to.
        """
        self._folder, self._first, self._steps = folder, after + 1, steps
        self._done = 0  # steps
        self._until = 0  # the last step of the running trace
        self._began = 0  # its first
        self._running: profile | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{TRIGGER}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"profile_dir is {folder}, which cannot be written to ({error.strerror}); name another folder"
            ) from None

    @staticmethod
    def of(config: EngineConfig) -> StepProfiler | None:
        """Make the profiler that the settings ask for; None: they ask for none. Raises the errors of `StepProfiler`."""
        if config.profile_dir is None:
            return None
        return StepProfiler(Path(config.profile_dir).expanduser(), config.profile_after, config.profile_steps)

    def around(self, step: Callable[[], T]) -> Callable[[], T]:
        """Return `step` with its profiling. An error of the step passes through, and ends no trace."""

        def profiled() -> T:
            number = self._done + 1
            if self._running is None and self._is_due(number):
                self._begin(number)
            with ExitStack() as named:
                if self._running is not None:
                    named.enter_context(record_function(f"step {number}"))
                try:
                    return step()
                finally:
                    self._done = number
                    named.close()
                    if self._running is not None and number >= self._until:
                        self.close()

        return profiled

    def close(self) -> None:
        """End the running trace, if there is one, and write it. A trace that cannot be written is told in the log."""
        if self._running is None:
            return
        running, self._running = self._running, None
        path = self._folder / f"steps-{self._began}-{self._done}-{time.strftime('%Y%m%dT%H%M%S')}.json.gz"
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what was launched belongs to the trace
            running.stop()
            running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            _log.error("the trace of steps %d to %d was not written: %s", self._began, self._done, error)
            return
        _log.info(
            "steps %d to %d are profiled in %s; open it in ui.perfetto.dev", self._began, self._done, path
        )

    def _is_due(self, number: int) -> bool:
        trigger = self._folder / TRIGGER
        if trigger.exists():
            trigger.unlink(missing_ok=True)
            return True
        return number == self._first

    def _begin(self, number: int) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._began, self._until = number, number + self._steps - 1
        self._running = profile(activities=activities)
        self._running.start()
        _log.info("profiling steps %d to %d", self._began, self._until)
