"""MetricLoggerCallback: logs computed metrics, including those with several values."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dream_callbacks.logging.callback import LoggerCallback
from dream_callbacks.logging.log_keys import evaluation_group, prefixed_key, set_prefix
from dream_callbacks.logging.scalars import Number, to_floats
from dream_trainer.callbacks import RankZeroCallback, intersection
from dream_trainer.numbers import as_number, is_number
from dream_trainer.trainer.mixins import EvalMetricMixin, LoggerMixin

logger = logging.getLogger(__name__)


@intersection
class MetricsAndLogger(EvalMetricMixin, LoggerMixin):
    """The mixins that MetricLoggerCallback requires of the trainer."""


class MetricLoggerCallback(RankZeroCallback[MetricsAndLogger]):
    """Logs the metrics after each validation run, as `val/<metric>`.

    A metric with several values, such as one per class, becomes `val/<metric>/<index>`; a dict
    becomes `val/<metric>/<key>`. If the collection has a LoggerCallback, which already logs scalar
    metrics, only these are logged. Copies all values to the host at once, after the run.

    Args:
        max_values: Metrics with more values are left out, with one warning each.

    Raises:
        ValueError: If `max_values` is below 1.
    """

    def __init__(self, *, max_values: int = 128) -> None:
        if max_values < 1:
            raise ValueError(f"max_values={max_values!r}: at least 1 is required")
        self.max_values = max_values
        self._reported: set[str] = set()
        self._left_out: set[str] = set()

    def pre_validation_epoch(self) -> None:
        self._reported = set()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        prefix = set_prefix(self.trainer)
        self._reported |= {f"{prefix}{key}" for key in result}

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if not self.trainer.sinks:
            return
        skips_scalars = any(isinstance(other, LoggerCallback) for other in self.trainer.callbacks)
        scalars: dict[str, Number] = {}
        group = evaluation_group(self.trainer)
        for key, value in result.items():
            # A key that no step reported was computed by a metric.
            if key not in self._reported and not (skips_scalars and is_number(value)):
                scalars.update(self._flat(prefixed_key(group, key), value))
        if scalars:
            self.trainer.log_dict(to_floats(scalars, self.trainer.world.device))

    def _flat(self, name: str, value: Any) -> Iterator[tuple[str, Number]]:
        number = as_number(value)
        if number is not None:
            yield name, number
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from self._flat(f"{name}/{key}", item)
        elif isinstance(value, Tensor) and not value.is_complex() and value.dim() > 0:
            if value.numel() <= self.max_values:
                for index, item in enumerate(value):
                    yield from self._flat(f"{name}/{index}", item)
            elif name not in self._left_out:
                self._left_out.add(name)
                logger.warning(
                    "metric %s has %d values, more than max_values=%d; it isn't logged",
                    name,
                    value.numel(),
                    self.max_values,
                )
        elif isinstance(value, (list, tuple)) and len(value) <= self.max_values:
            for index, item in enumerate(value):
                yield from self._flat(f"{name}/{index}", item)
