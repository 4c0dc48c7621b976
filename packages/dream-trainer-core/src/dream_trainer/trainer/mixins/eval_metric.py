"""EvalMetricMixin: metrics that are reset and computed around each validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.mixins.tracking import assigned_attributes


@runtime_checkable
class Metric(Protocol):
    """An object that accumulates a value over batches, such as a torchmetrics Metric."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute(self) -> Any: ...

    def reset(self) -> Any: ...


class EvalMetricMixin(AbstractTrainer):
    """Metrics assigned in `configure_metrics`; `validation_step` calls their `update`.

    They are reset before a validation run and computed after it. The value of `compute` is added to
    the run's result: under the metric's name, or under its own keys if it is a dict. It isn't
    reduced over ranks: torchmetrics does so itself, and so must a metric of your own.
    """

    _metric_names: tuple[str, ...] = ()

    def configure_metrics(self) -> None:
        """Assign metrics to attributes: `self.accuracy = …`. Optional."""

    def named_metrics(self) -> Mapping[str, Metric]:
        """Metrics by attribute name."""
        return {name: getattr(self, name) for name in self._metric_names}

    def build_metrics(self) -> None:
        """Call `configure_metrics`; move metrics that are modules to the device. Collective."""
        with assigned_attributes(self, lambda value: isinstance(value, Metric)) as names:
            self.configure_metrics()
        self._metric_names = tuple(names)
        self.world.agree(self._metric_names, "the metrics")
        for metric in self.named_metrics().values():
            if isinstance(metric, nn.Module):
                metric.to(self.world.device)

    def reset_metrics(self) -> None:
        for metric in self.named_metrics().values():
            metric.reset()

    def compute_metrics(self) -> dict[str, Any]:
        """Values of all metrics, by name. Collective if there is a metric.

        Raises:
            ValueError: On all ranks, if the keys differ between ranks.
        """
        values: dict[str, Any] = {}
        for name, metric in self.named_metrics().items():
            value = metric.compute()
            values.update(value if isinstance(value, Mapping) else {name: value})
        if self._metric_names:
            self.world.agree(sorted(values), "the keys of metrics")
        return values
