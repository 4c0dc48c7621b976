"""EvalMetricMixin: metrics of validation runs, and metrics of training epochs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.metric_state import MetricState
from dream_trainer.trainer.metrics import (
    Metric,
    Path,
    compute_all,
    find_metrics,
    metric_at,
    refuse_equal_keys,
)

logger = logging.getLogger(__name__)


class EvalMetricMixin(AbstractTrainer):
    """Metrics, which accumulate a value over batches: anything with update, compute and reset.

    `validation_step` calls `update` of those that are assigned in `configure_metrics` or
    `__init__`. They are reset before a validation run and computed after it.

    `training_step` calls `update` of those that are assigned in `configure_train_metrics`. They are
    reset before a training epoch, computed after it, and saved in checkpoints in between.

    Metrics are found in attributes, and in lists, tuples, dicts, ModuleLists and ModuleDicts that
    are attributes; not if the attribute's name begins with an underscore. The name of a metric is
    its attribute, followed by its keys: "accuracy", "by_class/0".

    The value of `compute` is added to the result of the run or the epoch: under the metric's name,
    or under its own keys if it is a dict. It isn't reduced over ranks: torchmetrics does so itself,
    and so must a metric of your own.
    """

    _metric_paths: Mapping[str, Path] = {}
    _train_metric_paths: Mapping[str, Path] = {}
    _train_metric_states: Mapping[str, MetricState] = {}
    _has_warned_of_metrics = False

    # What the user writes

    def configure_metrics(self) -> None:
        """Assign metrics of validation to attributes: `self.accuracy = …`. Optional."""

    def configure_train_metrics(self) -> None:
        """Assign metrics of training to attributes: `self.train_accuracy = …`. Optional."""

    # What the trainer reads

    def named_metrics(self) -> Mapping[str, Metric]:
        """Metrics of validation by name."""
        return {name: metric_at(self, path) for name, path in self._metric_paths.items()}

    def named_train_metrics(self) -> Mapping[str, Metric]:
        """Metrics of training by name."""
        return {name: metric_at(self, path) for name, path in self._train_metric_paths.items()}

    # Building

    def build_metrics(self) -> None:
        """Call the `configure_…` methods; move metrics that are modules to the device. Collective.

        Raises:
            ValueError: If two collections of metrics have a key in common; on all ranks, if the
                names of metrics differ between ranks.
        """
        self.configure_metrics()
        found = self._find_metrics()
        self.configure_train_metrics()
        of_validation = {id(metric_at(self, path)) for path in found.values()}
        self._train_metric_paths = {
            name: path
            for name, path in self._find_metrics().items()
            if id(metric_at(self, path)) not in of_validation
        }
        self._metric_paths = found
        self.world.agree(
            {"the metrics": (*found,), "the metrics of training": (*self._train_metric_paths,)}
        )
        for metrics in (self.named_metrics(), self.named_train_metrics()):
            refuse_equal_keys(metrics)
            for name, metric in metrics.items():
                if isinstance(metric, nn.Module):
                    _move(name, metric, self.world.device)
        self._train_metric_states = {
            name: MetricState(metric) for name, metric in self.named_train_metrics().items()
        }

    def _find_metrics(self) -> dict[str, Path]:
        models = {id(model) for model in self.named_models().values()}
        return {
            "/".join(map(str, path)): path
            for path, metric in find_metrics(vars(self))
            if id(metric) not in models
        }

    # Called by the loop

    def reset_metrics(self) -> None:
        for metric in self.named_metrics().values():
            metric.reset()

    def compute_metrics(self) -> dict[str, Any]:
        """Values of the metrics of validation, by name. Collective if there is one.

        Raises:
            ValueError: If two metrics give the same key; on all ranks, if the keys differ between
                ranks.
        """
        return self._compute(self.named_metrics())

    def reset_train_metrics(self) -> None:
        for metric in self.named_train_metrics().values():
            metric.reset()

    def compute_train_metrics(self) -> dict[str, Any]:
        """Values of the metrics of training, by name. Collective if there is one.

        Raises:
            ValueError: As `compute_metrics`.
        """
        return self._compute(self.named_train_metrics())

    def _compute(self, metrics: Mapping[str, Metric]) -> dict[str, Any]:
        values = compute_all(metrics)
        if metrics:
            self.world.agree(sorted(values), "the keys of metrics")
        return values

    def train_metrics_state_dict(self) -> dict[str, Any]:
        """State of this rank's metrics of training, as plain data; synchronizes with the device."""
        unsaved = [
            f"{name}.{attribute}"
            for name, state in self._train_metric_states.items()
            for attribute in state.unsaved()
        ]
        if unsaved and not self._has_warned_of_metrics and self.world.is_global_zero:
            self._has_warned_of_metrics = True
            logger.warning(
                "%s can't be saved, so a run that is resumed in mid-epoch loses what the batches "
                "before added; keep numbers, tensors and lists of them in the metric, or give it "
                "state_dict and load_state_dict",
                ", ".join(unsaved),
            )
        return {name: state.read() for name, state in self._train_metric_states.items()}

    def load_train_metrics_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state; metrics without one are reset, with a warning."""
        lost = [
            name
            for name, state in self._train_metric_states.items()
            if not state.restore(state_dict.get(name, {}), self.world.device)
        ]
        is_inside_epoch = self.counters.epoch_stage == "train" and self.counters.epoch_batches > 0
        if lost and is_inside_epoch and self.world.is_global_zero:
            logger.warning(
                "the state of the metrics of training %s isn't restored; in this epoch they cover "
                "only the batches that are left",
                ", ".join(lost),
            )


def _move(name: str, metric: nn.Module, device: torch.device) -> None:
    try:
        metric.to(device)
    except NotImplementedError as error:  # of tensors on meta, which have no values
        raise RuntimeError(
            f"the metric {name!r} can't be moved to {device}: {error}; assign it in "
            "configure_metrics or configure_train_metrics, not in configure_models, which may run "
            "on the meta device"
        ) from error
