"""Progress within the epoch, and the estimated remaining time of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dream_trainer.trainer import BaseTrainer


@dataclass(frozen=True)
class EpochProgress:
    """Progress within an epoch.

    Args:
        epoch: Number of the epoch, from 1.
        num_epochs: Total number of epochs; None if only steps or time limit the run.
        batches: Completed batches of the epoch.
        num_batches: Total batches of the epoch, fewer than the loader's if `max_steps` ends the
            run within it; None if unknown.
        steps: Completed optimizer steps of the epoch.
        num_steps: Total optimizer steps of the epoch; None if unknown.
    """

    epoch: int
    num_epochs: int | None
    batches: int
    num_batches: int | None
    steps: int
    num_steps: int | None

    @property
    def fraction(self) -> float | None:
        """Completed fraction of the epoch, 0 to 1; None if unknown."""
        return self.batches / self.num_batches if self.num_batches else None


def epoch_progress(trainer: BaseTrainer) -> EpochProgress:
    """Current progress of a trainer, also in the middle of a resumed epoch."""
    parameters, batches = trainer.training_parameters, trainer.counters.epoch_batches
    accumulation = parameters.gradient_accumulation_steps
    num_batches = trainer.num_train_batches
    num_steps = None if num_batches is None else math.ceil(num_batches / accumulation)
    steps = batches // accumulation if batches != num_batches else num_steps or 0
    if num_steps is not None and num_batches is not None and parameters.max_steps is not None:
        last = max(steps + parameters.max_steps - trainer.global_step, steps)
        num_steps, num_batches = min(num_steps, last), min(num_batches, last * accumulation)
    return EpochProgress(
        epoch=trainer.current_epoch + 1,
        num_epochs=_finite(parameters.epoch_limit),
        batches=batches,
        num_batches=num_batches,
        steps=steps,
        num_steps=num_steps,
    )


def seconds_left(
    trainer: BaseTrainer,
    *,
    batches_per_s: float | None,
    validation_s: float | None,
    elapsed_s: float,
) -> float | None:
    """Estimated remaining time of the run, by the limit that is reached first.

    Args:
        trainer: The trainer, in `fit`.
        batches_per_s: Training speed.
        validation_s: Duration of a validation run; None if unknown.
        elapsed_s: Time since `fit` began.

    Returns:
        Seconds; None if unknown.
    """
    parameters = trainer.training_parameters
    limits = []
    if parameters.max_time is not None:
        limits.append(parameters.max_time - elapsed_s)
    batches = _batches_left(trainer)
    if batches_per_s and math.isfinite(batches):
        validations = _validations_left(trainer, batches)
        limits.append(batches / batches_per_s + validations * (validation_s or 0.0))
    return max(min(limits), 0.0) if limits else None


def _batches_left(trainer: BaseTrainer) -> float:
    """Remaining batches by the limits of epochs and steps; infinite without a limit."""
    parameters, num_batches = trainer.training_parameters, trainer.num_train_batches
    steps = parameters.step_limit - trainer.global_step
    by_steps = steps * parameters.gradient_accumulation_steps
    if num_batches is None:
        return by_steps
    epochs = parameters.epoch_limit - trainer.current_epoch
    return min(by_steps, epochs * num_batches - trainer.counters.epoch_batches)


def _validations_left(trainer: BaseTrainer, batches: float) -> int:
    """Number of validation runs during the remaining batches."""
    parameters = trainer.training_parameters
    if not trainer.validates:
        return 0
    if parameters.val_every_n_steps is not None:
        steps = batches / parameters.gradient_accumulation_steps
        return int(steps // parameters.val_every_n_steps) if parameters.val_every_n_steps else 0
    return math.ceil(batches / trainer.num_train_batches) if trainer.num_train_batches else 0


def _finite(limit: float) -> int | None:
    return int(limit) if math.isfinite(limit) else None
