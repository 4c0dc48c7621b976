"""When schedulers are stepped: with which optimizer, or once per epoch or validation run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from dream_trainer.interface.lr_schedule import LRSchedule
from dream_trainer.numbers import as_float
from dream_trainer.world.world import World

logger = logging.getLogger(__name__)


def schedulers_by_step(schedules: Iterable[LRSchedule]) -> dict[Optimizer, list[Any]]:
    """The schedulers that are stepped with each step of an optimizer."""
    schedulers: dict[Optimizer, list[Any]] = {}
    for each in schedules:
        if each.interval == "step" and each.optimizer is not None:
            schedulers.setdefault(each.optimizer, []).append(each.scheduler)
    return schedulers


class EpochSchedules:
    """Steps schedulers at the end of epochs and after validation runs.

    A scheduler of an epoch that has a monitor is stepped at the end of the epoch, by the value that
    was reported last. Values are saved, so it is stepped once also if the run is resumed between.

    Args:
        schedules: All schedules by name.
        world: Rank 0's values are sent to all ranks.
    """

    def __init__(self, schedules: Mapping[str, LRSchedule], world: World) -> None:
        self._of_epoch = {n: each for n, each in schedules.items() if each.interval == "epoch"}
        self._of_validation = {
            name: each for name, each in schedules.items() if each.interval == "validation"
        }
        self._unmonitored = {
            name: each.scheduler
            for name, each in schedules.items()
            if each.interval == "manual" and isinstance(each.scheduler, ReduceLROnPlateau)
        }
        self._world = world
        self._values: dict[str, float] = {}
        self._reported: dict[str, list[str]] = {}
        self._num_ended = 0

    def begin_epoch(self) -> None:
        """Forget the values of the epoch before."""
        self.warn_of_unstepped()
        self._values, self._reported = {}, {}

    def after_training(self, result: Mapping[str, Any]) -> None:
        """Read the result of a training epoch. Collective if a scheduler has a monitor."""
        self._reported["training"] = list(result)
        for name, schedule in self._of_epoch.items():
            if schedule.monitor is not None and schedule.monitor in result:
                self._values.setdefault(name, self._value(name, schedule.monitor, result))

    def after_validation(self, result: Mapping[str, Any]) -> None:
        """Read the result of a validation run. Collective if a scheduler has a monitor.

        Raises:
            RuntimeError: If a scheduler that is stepped by it doesn't find its monitor.
        """
        self._reported["validation"] = list(result)
        for name, schedule in self._of_epoch.items():
            if schedule.monitor is not None and schedule.monitor in result:
                self._values[name] = self._value(name, schedule.monitor, result)
        for name, schedule in self._of_validation.items():
            if schedule.monitor is None:
                schedule.scheduler.step()
            elif schedule.monitor in result:
                schedule.scheduler.step(self._value(name, schedule.monitor, result))
            else:
                raise RuntimeError(
                    f"scheduler {name!r}: monitor={schedule.monitor!r} isn't in the result of "
                    f"validation ({_listed(result)}); set monitor to one of these"
                )

    def end_epoch(self, *, is_validated: bool) -> None:
        """Step the schedulers of an epoch.

        Args:
            is_validated: Whether each epoch ends with a validation run.

        Raises:
            RuntimeError: If no result of the epoch has a scheduler's monitor.
        """
        for name, schedule in self._of_epoch.items():
            if schedule.monitor is None:
                schedule.scheduler.step()
            elif name in self._values:
                schedule.scheduler.step(self._values[name])
            else:
                self._refuse_missing(name, schedule.monitor, is_validated=is_validated)
        self._values = {}
        self._num_ended += 1

    def warn_of_unstepped(self) -> None:
        """Warn once of each ReduceLROnPlateau that wasn't stepped in the first epoch."""
        if self._num_ended and self._world.is_global_zero:
            for name, scheduler in self._unmonitored.items():
                if scheduler.last_epoch == 0:
                    logger.warning(
                        "scheduler %r (ReduceLROnPlateau) was never stepped, since it needs a "
                        "result; return LRSchedule(self.%s, monitor=…) from configure_schedulers, "
                        "with a key of a result",
                        name,
                        name,
                    )
        if self._num_ended:
            self._unmonitored = {}

    def state_dict(self) -> dict[str, float]:
        """Values of monitors in the current epoch, by scheduler."""
        return dict(self._values)

    def load_state_dict(self, state_dict: Mapping[str, float]) -> None:
        """Continue in the middle of an epoch."""
        self._values = {n: value for n, value in state_dict.items() if n in self._of_epoch}
        self._reported = {}

    def _value(self, name: str, monitor: str, result: Mapping[str, Any]) -> float:
        value = as_float(result[monitor])
        if value is None:
            raise RuntimeError(
                f"scheduler {name!r}: {monitor} is a {type(result[monitor]).__name__} with the "
                f"value {result[monitor]!r:.80}; a number is required"
            )
        return self._world.broadcast_object(value)

    def _refuse_missing(self, name: str, monitor: str, *, is_validated: bool) -> None:
        of_training, of_validation = map(self._reported.get, ("training", "validation"))
        if of_training is None or (is_validated and of_validation is None):
            logger.warning(
                "scheduler %r isn't stepped in this epoch: there is no new result with %s, since "
                "the run was resumed after training it, or it had no optimizer step",
                name,
                monitor,
            )
            return
        advice = "set monitor to one of these"
        if of_validation is None:
            validation = "no validation ran"
            advice += ', or, if validation runs every N steps, interval="validation"'
        else:
            validation = f"validation reported {_listed(of_validation)}"
        raise RuntimeError(
            f"scheduler {name!r}: monitor={monitor!r} is in no result of the epoch: training "
            f"reported {_listed(of_training)}, {validation}; {advice}"
        )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(keys) or "nothing"
