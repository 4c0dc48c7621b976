"""Measurement: durations, samples and waiting of a run's steps, recent ones and all of them."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dream_callbacks.profile.step_times import CudaClock, HostClock, StepTimes


@dataclass(frozen=True)
class Steps:
    """Some steps that were measured.

    Attributes:
        durations_s: Seconds of each.
        num_samples: That this rank processed in them.
        waiting_share: Part of the host's time that was spent between batches.
    """

    durations_s: Sequence[float]
    num_samples: int
    waiting_share: float


class _Totals:
    def __init__(self) -> None:
        self.durations_s = array("d")
        self.num_samples = 0
        self.waiting_s = 0.0
        self.busy_s = 0.0

    def steps(self) -> Steps:
        host_s = self.waiting_s + self.busy_s
        share = self.waiting_s / host_s if host_s > 0 else 0.0
        return Steps(self.durations_s, self.num_samples, share)


class Measurement:
    """Told of batches and steps as they begin and end; never waits for the device.

    Args:
        device: What the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._times: StepTimes[Any] = StepTimes(
            CudaClock() if device.type == "cuda" else HostClock()
        )
        self._all, self._recent = _Totals(), _Totals()
        self._num_samples = 0
        self._batch_began_s = self._batch_ended_s = time.perf_counter()

    def restart(self) -> None:
        """The next step begins now; what was before it belongs to none."""
        self._times.restart()
        self._num_samples = 0
        self._batch_ended_s = time.perf_counter()

    def begin_batch(self, num_samples: int) -> None:
        """A batch of the step begins."""
        self._num_samples += num_samples
        self._batch_began_s = time.perf_counter()
        for totals in (self._all, self._recent):
            totals.waiting_s += self._batch_began_s - self._batch_ended_s

    def end_batch(self) -> None:
        """The batch is done."""
        self._batch_ended_s = time.perf_counter()
        for totals in (self._all, self._recent):
            totals.busy_s += self._batch_ended_s - self._batch_began_s

    def end_step(self) -> None:
        """The step is done with the batch, and the next begins."""
        self._times.step(self._num_samples)
        self._num_samples = 0

    def take_recent(self) -> Steps:
        """Steps since the last time, as far as the device is done with them."""
        self._gather(wait=False)
        recent, self._recent = self._recent, _Totals()
        return recent.steps()

    def finish(self) -> Steps:
        """All steps. Waits for the device."""
        self._gather(wait=True)
        return self._all.steps()

    def _gather(self, *, wait: bool) -> None:
        for duration_s, num_samples in self._times.take(wait=wait):
            for totals in (self._all, self._recent):
                totals.durations_s.append(duration_s)
                totals.num_samples += num_samples
