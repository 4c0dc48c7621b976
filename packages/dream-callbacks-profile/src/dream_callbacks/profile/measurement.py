"""Measurement: durations, samples and waiting time of recent steps and of all steps."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dream_callbacks.profile.step_times import CudaClock, HostClock, StepTimes


@dataclass(frozen=True)
class MeasuredSteps:
    """Measured steps.

    Attributes:
        durations_s: Duration of each step, in seconds.
        num_samples: Samples that this rank processed in all of them.
        waiting_share: Fraction of the host time spent between batches.
    """

    durations_s: Sequence[float]
    num_samples: float | Tensor
    waiting_share: float


class _Totals:
    def __init__(self) -> None:
        self.durations_s = array("d")
        self.num_samples: float | Tensor = 0
        self.waiting_s = 0.0
        self.busy_s = 0.0

    def steps(self) -> MeasuredSteps:
        host_s = self.waiting_s + self.busy_s
        share = self.waiting_s / host_s if host_s > 0 else 0.0
        return MeasuredSteps(self.durations_s, self.num_samples, share)


class Measurement:
    """Measures steps from the start and end of batches, without device syncs until `finish`.

    Args:
        device: Device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._times: StepTimes[Any] = StepTimes(
            CudaClock() if device.type == "cuda" else HostClock()
        )
        self._all, self._recent = _Totals(), _Totals()
        self._num_samples: float | Tensor = 0
        self._batch_start_s = self._batch_end_s = time.perf_counter()

    def restart(self) -> None:
        """Start the next step now; the time before belongs to no step."""
        self._times.restart()
        self._num_samples = 0
        self._batch_end_s = time.perf_counter()

    def begin_batch(self, num_samples: float | Tensor) -> None:
        """Start a batch of the step."""
        self._num_samples += num_samples
        self._batch_start_s = time.perf_counter()
        for totals in (self._all, self._recent):
            totals.waiting_s += self._batch_start_s - self._batch_end_s

    def end_batch(self) -> None:
        """End the batch."""
        self._batch_end_s = time.perf_counter()
        for totals in (self._all, self._recent):
            totals.busy_s += self._batch_end_s - self._batch_start_s

    def end_step(self) -> None:
        """End the step and start the next."""
        self._times.step(self._num_samples)
        self._num_samples = 0

    def take_recent(self) -> MeasuredSteps:
        """Steps since the last call that the device has completed."""
        self._collect(wait=False)
        recent, self._recent = self._recent, _Totals()
        return recent.steps()

    def finish(self) -> MeasuredSteps:
        """All steps. One device sync."""
        self._collect(wait=True)
        return self._all.steps()

    def _collect(self, *, wait: bool) -> None:
        for duration_s, num_samples in self._times.take(wait=wait):
            for totals in (self._all, self._recent):
                totals.durations_s.append(duration_s)
                totals.num_samples += num_samples
