"""Write a profiler trace of some steps, for https://ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.reporting.display import Display

NAME = "trace.json.gz"


class Trace:
    """A trace of the steps `steps[0]` to `steps[1]`, both included; no trace if `steps` is None.

    Profiled steps are slower than others. A run that ends inside of the steps writes the part that
    it has. A trace from an earlier start of the run is replaced.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, display: Display) -> None:
        self._steps = steps
        self._path = directory / NAME
        self._display = display
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Start the profiler if `step`, the next step, is the first of the trace."""
        if self._steps and step == self._steps[0]:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profile = profile(activities=kinds)
            self._profile.start()

    def after(self, step: int) -> None:
        """Write the trace if `step` was its last step."""
        if self._steps and step == self._steps[1]:
            self._write()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def _write(self) -> None:
        if self._profile is not None:
            running, self._profile = self._profile, None
            running.stop()
            running.export_chrome_trace(str(self._path))
            self._display.say(f"the profiler's trace is in {self._path}; open it in https://ui.perfetto.dev")
