"""LRLoggerCallback: logs the learning rate used by each step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dream_callbacks.logging.batch_cadence import BatchCadence, check_cadence
from dream_callbacks.logging.callback import LoggerCallback
from dream_trainer.callbacks import RankZeroCallback
from dream_trainer.trainer.mixins import LoggerMixin


class LRLoggerCallback(RankZeroCallback[LoggerMixin]):
    """Logs the learning rates: `lr`, or with several optimizers or parameter groups
    `lr/<optimizer>`, `lr/<group>`, `lr/<optimizer>/<group>`. `<group>` is the group's "name" or
    its index.

    The value at step N is the one that step N used, before the scheduler changed it. Costs
    nothing on steps that don't log; otherwise one device sync for each learning rate that is a
    device tensor.

    Args:
        log_every_n_train_batches: Default: as often as the collection's LoggerCallback, or every
            step.

    Raises:
        ValueError: If `log_every_n_train_batches` is below 1.
    """

    def __init__(self, log_every_n_train_batches: int | None = None) -> None:
        check_cadence("log_every_n_train_batches", log_every_n_train_batches)
        self.log_every_n_train_batches = log_every_n_train_batches
        self._begin(BatchCadence(1, 0), 0)

    def _begin(self, cadence: BatchCadence, num_batches: int) -> None:
        self._cadence = cadence
        self._asked_at = num_batches
        self._is_due = False
        self._rates: dict[str, float] = {}

    def pre_fit(self) -> None:
        num_batches, every = self.trainer.local_batches, self.log_every_n_train_batches
        cadence = BatchCadence(every, num_batches) if every else self._logger_cadence(num_batches)
        self._begin(cadence or BatchCadence(1, num_batches), num_batches)

    def pre_optimizer_step(self, model: nn.Module, optimizer: Optimizer) -> None:
        num_batches = self.trainer.local_batches + 1  # the counters advance after the step
        if num_batches != self._asked_at:
            self._asked_at = num_batches
            self._is_due = self._cadence.due(num_batches)
        if self._is_due:
            self._rates |= self._learning_rates(optimizer)

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._rates:
            self.trainer.log_dict(self._rates)
            self._rates = {}

    def _learning_rates(self, optimizer: Optimizer) -> dict[str, float]:
        optimizers = self.trainer.named_optimizers()
        names = [name for name, other in optimizers.items() if other is optimizer]
        head = ["lr", *(names if len(optimizers) > 1 else [])]
        groups = optimizer.param_groups
        return {
            "/".join([*head, *([str(group.get("name", index))] if len(groups) > 1 else [])]): float(
                group["lr"]
            )
            for index, group in enumerate(groups)
            if "lr" in group
        }

    def _logger_cadence(self, num_batches: int) -> BatchCadence | None:
        cadences = (
            callback.cadence(num_batches)
            for callback in self.trainer.callbacks
            if isinstance(callback, LoggerCallback)
        )
        return next(cadences, None)
