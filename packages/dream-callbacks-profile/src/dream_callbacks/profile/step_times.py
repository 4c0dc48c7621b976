"""Durations of steps, from marks on the host or device timeline, read without a device sync."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

MarkT = TypeVar("MarkT")


class Clock(Protocol[MarkT]):
    """A timeline on which marks are set."""

    def mark(self) -> MarkT:
        """A mark: now, or when the device has completed everything queued so far."""

    def is_reached(self, mark: MarkT) -> bool:
        """Whether the mark has been reached. Doesn't wait."""

    def seconds(self, start: MarkT, end: MarkT) -> float:
        """Time between two marks that have been reached."""

    def wait(self) -> None:
        """Wait until all marks have been reached."""


class HostClock:
    """Host time, for devices whose operations are synchronous."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        """Does nothing: all operations are synchronous."""


class CudaClock:
    """Events in the device's current stream: 2 µs each, without a device sync."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_reached(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def wait(self) -> None:
        torch.cuda.current_stream().synchronize()


class StepTimes(Generic[MarkT]):
    """Durations of steps, each from one mark to the next, with their numbers of samples.

    Args:
        clock: Timeline of the marks.
    """

    def __init__(self, clock: Clock[MarkT]) -> None:
        self._clock = clock
        self._start: MarkT | None = None
        self._pending: deque[tuple[MarkT, MarkT, float | Tensor]] = deque()

    def restart(self) -> None:
        """Start the next step now; the time before belongs to no step."""
        self._start = self._clock.mark()

    def step(self, num_samples: float | Tensor) -> None:
        """End a step and start the next."""
        now = self._clock.mark()
        if self._start is not None:
            self._pending.append((self._start, now, num_samples))
        self._start = now

    def take(self, *, wait: bool = False) -> list[tuple[float, float | Tensor]]:
        """Seconds and samples of the completed steps since the last call, in order.

        Args:
            wait: Wait until all steps have completed.
        """
        if wait:
            self._clock.wait()
        taken: list[tuple[float, float | Tensor]] = []
        while self._pending and self._clock.is_reached(self._pending[0][1]):
            start, end, num_samples = self._pending.popleft()
            taken.append((self._clock.seconds(start, end), num_samples))
        return taken


def quantile(values: Iterable[float], share: float) -> float:
    """The quantile of the values, with linear interpolation.

    Raises:
        ValueError: If there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("a quantile of no values is undefined; at least 1 is required")
    position = share * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))
