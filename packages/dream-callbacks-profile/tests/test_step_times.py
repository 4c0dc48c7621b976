"""Durations of steps: attribution of time to steps, and quantiles."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from dream_callbacks.profile.step_times import CudaClock, StepTimes, quantile


class Calendar:
    """A clock with marks in whole seconds; later marks are not reached yet."""

    def __init__(self) -> None:
        self.now = 0
        self.reached = 1000

    def mark(self) -> int:
        return self.now

    def is_reached(self, mark: int) -> bool:
        return mark <= self.reached

    def seconds(self, start: int, end: int) -> float:
        return end - start

    def wait(self) -> None:
        self.reached = self.now


def test_a_step_lasts_from_the_end_of_the_previous_step_to_its_own():
    calendar = Calendar()
    times = StepTimes(calendar)
    times.restart()

    for calendar.now in (3, 4, 9):
        times.step(num_samples=calendar.now)

    assert times.take() == [(3, 3), (1, 4), (5, 9)]
    assert times.take() == []


def test_time_before_a_restart_belongs_to_no_step():
    calendar = Calendar()
    times = StepTimes(calendar)
    times.restart()

    calendar.now = 2
    times.step(1)
    calendar.now = 50
    times.restart()
    calendar.now = 53
    times.step(1)

    assert times.take() == [(2, 1), (3, 1)]


def test_a_first_step_without_a_start_is_left_out():
    times = StepTimes(Calendar())

    times.step(1)
    times.step(2)

    assert times.take() == [(0, 2)]


def test_steps_that_the_device_has_not_completed_are_returned_later():
    calendar = Calendar()
    times = StepTimes(calendar)
    times.restart()
    for calendar.now in (1, 2, 3):
        times.step(1)

    calendar.reached = 2
    first = times.take()
    rest = times.take(wait=True)

    assert len(first) == 2
    assert len(rest) == 1


@pytest.mark.parametrize("num_values", [1, 2, 3, 10, 101])
def test_quantiles_match_the_standard_library(num_values):
    values = [float((n * 37) % 101) for n in range(num_values)]

    assert quantile(values, 0.5) == statistics.median(values)
    if num_values > 1:
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        assert quantile(values, 0.9) == pytest.approx(deciles[8], rel=1e-12)


def test_a_quantile_of_no_values_is_rejected():
    with pytest.raises(ValueError, match="at least 1 is required"):
        quantile([], 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_marks_measure_device_time_without_a_sync():
    times = StepTimes(CudaClock())
    times.restart()

    torch.cuda._sleep(200_000_000)  # noqa: SLF001  # cycles: 0.1 s or so
    started_s = time.perf_counter()
    times.step(1)
    host_s = time.perf_counter() - started_s

    assert times.take() == []
    ((duration_s, _),) = times.take(wait=True)
    assert host_s < 0.05 < duration_s
