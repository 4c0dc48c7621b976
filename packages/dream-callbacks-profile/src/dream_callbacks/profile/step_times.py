"""How long steps take: marks on the host's or the device's time line, read without waiting."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

import torch

MarkT = TypeVar("MarkT")


class Clock(Protocol[MarkT]):
    """Where the marks are set."""

    def mark(self) -> MarkT:
        """A moment: now, or when the device has done all that it was given so far."""

    def is_reached(self, mark: MarkT) -> bool:
        """Whether the moment has come. Doesn't wait."""

    def seconds(self, start: MarkT, end: MarkT) -> float:
        """Time between two moments that have come."""

    def wait(self) -> None:
        """Return when all moments have come."""


class HostClock:
    """For devices on which operations are done when they return."""

    def mark(self) -> float:
        return time.perf_counter()

    def is_reached(self, mark: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def wait(self) -> None:
        """Nothing runs later than it is called."""


class CudaClock:
    """Events in the device's current stream: 2 µs each, and the host doesn't wait."""

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
    """Durations of steps, each from one mark to the next, with the samples that they took.

    Args:
        clock: Where the marks are set.
    """

    def __init__(self, clock: Clock[MarkT]) -> None:
        self._clock = clock
        self._start: MarkT | None = None
        self._pending: deque[tuple[MarkT, MarkT, int]] = deque()

    def restart(self) -> None:
        """The next step begins now; what was before it belongs to none."""
        self._start = self._clock.mark()

    def step(self, num_samples: int) -> None:
        """A step is done, and the next begins."""
        now = self._clock.mark()
        if self._start is not None:
            self._pending.append((self._start, now, num_samples))
        self._start = now

    def take(self, *, wait: bool = False) -> list[tuple[float, int]]:
        """Seconds and samples of the steps, in order, that weren't taken yet and have ended.

        Args:
            wait: Until all have ended.
        """
        if wait:
            self._clock.wait()
        taken: list[tuple[float, int]] = []
        while self._pending and self._clock.is_reached(self._pending[0][1]):
            start, end, num_samples = self._pending.popleft()
            taken.append((self._clock.seconds(start, end), num_samples))
        return taken


def quantile(values: Iterable[float], share: float) -> float:
    """The value below which a share of the values lies, interpolated between neighbours.

    Raises:
        ValueError: If there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("there are no values to take a quantile of; at least 1 is required")
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))
