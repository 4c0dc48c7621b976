"""Rate: how many per second, smoothed exponentially."""

from __future__ import annotations


class Rate:
    """How fast a count grows.

    Args:
        smoothing: Weight of the newest measurement against all before it, 0 to 1. 0 gives the
            mean since the beginning, 1 the last measurement.
    """

    def __init__(self, smoothing: float) -> None:
        self._keep = 1.0 - smoothing
        self._counted = 0.0
        self._seconds = 0.0
        self._count = 0
        self._time_s = 0.0

    def restart(self, count: int, time_s: float) -> None:
        """Measure on from here: what passed since the last call isn't counted."""
        self._count, self._time_s = count, time_s

    def add(self, count: int, time_s: float) -> None:
        """Take in that the count has grown.

        While it hasn't, nothing is taken in, and the time counts towards its next growth.
        """
        growth, seconds = count - self._count, time_s - self._time_s
        if growth > 0:
            # Counts and seconds are smoothed apart: their ratio isn't bent by odd measurements.
            self._counted = self._keep * self._counted + growth
            self._seconds = self._keep * self._seconds + seconds
        if growth != 0:  # a count that fell was set back, by a checkpoint for example
            self.restart(count, time_s)

    @property
    def per_second(self) -> float | None:
        """None until there is something to tell from."""
        return self._counted / self._seconds if self._seconds > 0 else None
