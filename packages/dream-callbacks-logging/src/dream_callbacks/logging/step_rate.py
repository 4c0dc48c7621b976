"""Steps per second of training, excluding validation and time between epochs."""

from __future__ import annotations

import time


class Stopwatch:
    """Accumulates seconds while it is running."""

    def __init__(self) -> None:
        self._counted_s = 0.0
        self._since_s: float | None = None

    @property
    def is_running(self) -> bool:
        return self._since_s is not None

    @property
    def seconds(self) -> float:
        running_s = 0.0 if self._since_s is None else time.monotonic() - self._since_s
        return self._counted_s + running_s

    def run(self) -> None:
        """Start or continue; no effect while running."""
        if self._since_s is None:
            self._since_s = time.monotonic()

    def pause(self) -> None:
        """Stop until the next `run`."""
        self._counted_s = self.seconds
        self._since_s = None


class StepRate:
    """Steps per second of a stopwatch.

    Args:
        step: Steps completed at the start.
        watch: Measures the seconds.
    """

    def __init__(self, step: int, watch: Stopwatch) -> None:
        self._watch = watch
        self._step = step
        self._seconds = watch.seconds

    def read(self, step: int) -> float:
        """Steps per second since the last call, with `step` steps completed now."""
        seconds = self._watch.seconds
        num_steps, passed_s = step - self._step, seconds - self._seconds
        self._step, self._seconds = step, seconds
        return num_steps / passed_s if passed_s > 0 else 0.0
