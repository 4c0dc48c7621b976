"""Where a run stands, and how long the rest of it will take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dream_trainer.trainer import BaseTrainer


@dataclass(frozen=True)
class Place:
    """Where in an epoch a run stands.

    Args:
        epoch: Number of the epoch, from 1.
        num_epochs: How many there will be; None if only steps or seconds end the run.
        batches: Batches of the epoch that are done.
        num_batches: Batches that the epoch will have, fewer than the loader's if `max_steps` ends
            the run inside it; None if that can't be known.
        steps: Optimizer steps of the epoch that are done.
        num_steps: Optimizer steps that the epoch will have, as `num_batches`.
    """

    epoch: int
    num_epochs: int | None
    batches: int
    num_batches: int | None
    steps: int
    num_steps: int | None

    @property
    def fraction(self) -> float | None:
        """How much of the epoch is done, 0 to 1."""
        return self.batches / self.num_batches if self.num_batches else None


def place_of(trainer: BaseTrainer) -> Place:
    """Where a trainer stands now, also in the middle of an epoch that another session began."""
    parameters, batches = trainer.training_parameters, trainer.counters.epoch_batches
    accumulation = parameters.gradient_accumulation_steps
    num_batches = trainer.num_train_batches
    num_steps = None if num_batches is None else math.ceil(num_batches / accumulation)
    steps = batches // accumulation if batches != num_batches else num_steps or 0
    if num_steps is not None and num_batches is not None and parameters.max_steps is not None:
        last = max(steps + parameters.max_steps - trainer.global_step, steps)
        num_steps, num_batches = min(num_steps, last), min(num_batches, last * accumulation)
    return Place(
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
    """How long the run will take from now on, by whichever of its limits comes first.

    Args:
        trainer: In `fit`.
        batches_per_s: How fast it trains.
        validation_s: How long a validation run takes, if one has been seen.
        elapsed_s: How long `fit` has been running.

    Returns:
        Seconds; None if that can't be told yet.
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
    """Batches until the last epoch or step; infinite if neither is known."""
    parameters, num_batches = trainer.training_parameters, trainer.num_train_batches
    steps = parameters.step_limit - trainer.global_step
    by_steps = steps * parameters.gradient_accumulation_steps
    if num_batches is None:
        return by_steps
    epochs = parameters.epoch_limit - trainer.current_epoch
    return min(by_steps, epochs * num_batches - trainer.counters.epoch_batches)


def _validations_left(trainer: BaseTrainer, batches: float) -> int:
    """Validation runs that come with so many more batches."""
    parameters = trainer.training_parameters
    if not trainer.validates:
        return 0
    if parameters.val_every_n_steps is not None:
        steps = batches / parameters.gradient_accumulation_steps
        return int(steps // parameters.val_every_n_steps) if parameters.val_every_n_steps else 0
    return math.ceil(batches / trainer.num_train_batches) if trainer.num_train_batches else 0


def _finite(limit: float) -> int | None:
    return int(limit) if math.isfinite(limit) else None
