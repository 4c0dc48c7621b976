"""SmoothedRate: an exponentially smoothed rate per second."""

from __future__ import annotations


class SmoothedRate:
    """Growth of a count per second, exponentially smoothed.

    Args:
        smoothing: Weight of the latest measurement, 0 to 1. 0 gives the mean since the beginning,
            1 the last measurement.
    """

    def __init__(self, smoothing: float) -> None:
        self._decay = 1.0 - smoothing
        self._smoothed_count = 0.0
        self._smoothed_s = 0.0
        self._count = 0
        self._time_s = 0.0

    def restart(self, count: int, time_s: float) -> None:
        """Continue from here; what passed since the last call isn't counted."""
        self._count, self._time_s = count, time_s

    def add(self, count: int, time_s: float) -> None:
        """Add a measurement.

        If the count hasn't grown, nothing is added, and the time counts towards its next growth.
        """
        growth, seconds = count - self._count, time_s - self._time_s
        if growth > 0:
            # Smoothing counts and seconds separately keeps outliers from biasing their ratio.
            self._smoothed_count = self._decay * self._smoothed_count + growth
            self._smoothed_s = self._decay * self._smoothed_s + seconds
        if growth != 0:  # a count that fell was reset, for example by a restored checkpoint
            self.restart(count, time_s)

    @property
    def per_second(self) -> float | None:
        """The rate; None before the first measurement."""
        return self._smoothed_count / self._smoothed_s if self._smoothed_s > 0 else None
