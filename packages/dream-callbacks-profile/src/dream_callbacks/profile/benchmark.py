"""BenchmarkCallback: step times, throughput and peak memory of a run."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from typing import Any

import torch

from dream_callbacks.profile.measurement import MeasuredSteps, Measurement
from dream_callbacks.profile.step_times import quantile
from dream_trainer.callbacks import Every, RankZeroCallback
from dream_trainer.trainer.mixins import LoggerMixin

logger = logging.getLogger(__name__)

_DEFAULT_EVERY = Every(steps=50)


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Speed of some optimizer steps.

    Attributes:
        num_steps: Number of measured steps.
        median_s: Median step time in seconds.
        p90_s: 90th percentile of the step time in seconds.
        samples_per_s: Throughput over all data-parallel ranks.
        tokens_per_s: The same in tokens; None without `tokens_per_sample`.
        waiting_share: Fraction of the host time between the end of a batch and the start of the
            next: the loader, and callbacks after a batch.
        peak_bytes: Peak memory so far, of the rank's CUDA device or else of the process.
    """

    num_steps: int
    median_s: float
    p90_s: float
    samples_per_s: float
    tokens_per_s: float | None
    waiting_share: float
    peak_bytes: int

    def __str__(self) -> str:
        tokens = "" if self.tokens_per_s is None else f", {self.tokens_per_s:,.0f} tokens/s"
        return (
            f"{self.num_steps} steps, median {self.median_s * 1e3:.3g} ms, "
            f"90 % within {self.p90_s * 1e3:.3g} ms, {self.samples_per_s:,.1f} samples/s{tokens}, "
            f"{self.waiting_share:.0%} of the time waiting for batches, "
            f"peak memory {self.peak_bytes / 2**20:,.0f} MiB"
        )

    def scalars(self) -> dict[str, float]:
        """The values by the names that they are logged under."""
        values = {
            "benchmark/step_ms_median": self.median_s * 1e3,
            "benchmark/step_ms_p90": self.p90_s * 1e3,
            "benchmark/samples_per_s": self.samples_per_s,
            "benchmark/tokens_per_s": self.tokens_per_s,
            "benchmark/waiting_share": self.waiting_share,
            "benchmark/peak_memory_mib": self.peak_bytes / 2**20,
        }
        return {name: value for name, value in values.items() if value is not None}


class BenchmarkCallback(RankZeroCallback):
    """Measures optimizer steps on global rank 0, with an overhead of a few microseconds each.

    A step lasts from the end of the previous step to its own end, including loading and callbacks,
    excluding validation and the time between epochs. On CUDA, device time is measured with events,
    with one device sync at the end of `fit`; the device's peak memory statistics are reset when
    measuring starts.

    Values are logged at the cadence `every` if the trainer has a LoggerMixin, and at the end of
    `fit` to Python's logging; `result` holds them.

    Args:
        skip: Steps at the beginning of each `fit` that aren't measured.
        every: How often to log.
        tokens_per_sample: Enables tokens per second.

    Attributes:
        result: Result over all measured steps of the last `fit`; None if there were none.

    Raises:
        ValueError: If `skip` is below 0 or `tokens_per_sample` below 1.
    """

    def __init__(
        self,
        skip: int = 5,
        every: Every = _DEFAULT_EVERY,
        *,
        tokens_per_sample: int | None = None,
    ) -> None:
        if skip < 0:
            raise ValueError(f"skip={skip}: a number of optimizer steps, at least 0, is required")
        if tokens_per_sample is not None and tokens_per_sample < 1:
            raise ValueError(f"tokens_per_sample={tokens_per_sample}: at least 1 is required")
        self.skip = skip
        self.every = every
        self.tokens_per_sample = tokens_per_sample
        self.result: BenchmarkResult | None = None
        self._measurement: Measurement | None = None

    def pre_fit(self) -> None:
        self.result = None
        self._measurement = None
        self._first_step = self.trainer.global_step

    def pre_train_epoch(self) -> None:
        self._start_if_due()
        if self._measurement is not None:
            self._measurement.restart()

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self._measurement is not None:
            self._measurement.begin_batch(self.trainer.num_samples(batch))

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._measurement is not None:
            self._measurement.end_batch()
        if self.trainer.is_accumulating_gradients:
            return
        if self._measurement is None:
            self._start_if_due()
            return
        self._measurement.end_step()
        if self._cadence.due(self.trainer.global_step, self.trainer.current_epoch):
            self._log(self._measurement.take_recent())

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if self._measurement is not None:
            self._measurement.restart()

    def post_fit(self) -> None:
        measurement, self._measurement = self._measurement, None
        if self.trainer.exception is not None:
            return
        steps = None if measurement is None else measurement.finish()
        if steps is None or not steps.durations_s:
            logger.warning("fit had no step to measure after skip=%d steps; lower skip", self.skip)
            return
        self.result = self._result(steps)
        logger.info("benchmark: %s", self.result)

    def _start_if_due(self) -> None:
        step, device = self.trainer.global_step, self.trainer.world.device
        if self._measurement is None and step - self._first_step >= self.skip:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            self._cadence = self.every.start(step, self.trainer.current_epoch)
            self._measurement = Measurement(device)
            self._measurement.restart()

    def _log(self, steps: MeasuredSteps) -> None:
        if isinstance(self.trainer, LoggerMixin) and steps.durations_s:
            self.trainer.log_dict(self._result(steps).scalars())

    def _result(self, steps: MeasuredSteps) -> BenchmarkResult:
        world = self.trainer.world
        samples_per_s = float(steps.num_samples) * world.dp_size / sum(steps.durations_s)
        tokens = self.tokens_per_sample
        return BenchmarkResult(
            num_steps=len(steps.durations_s),
            median_s=quantile(steps.durations_s, 0.5),
            p90_s=quantile(steps.durations_s, 0.9),
            samples_per_s=samples_per_s,
            tokens_per_s=None if tokens is None else samples_per_s * tokens,
            waiting_share=steps.waiting_share,
            peak_bytes=_peak_bytes(world.device),
        )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_measurement": None}


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    # In bytes on macOS, in KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
