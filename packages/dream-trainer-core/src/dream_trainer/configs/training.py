"""Length of training, cadence of validation, accumulation and clipping of gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from dream_trainer.configs.checked_fields import CheckedFields


@dataclass(kw_only=True)
class TrainingParameters(CheckedFields):
    """Length, validation and gradients of a run.

    A *batch* is one `training_step`; a *step* is one optimizer step, made of
    `gradient_accumulation_steps` batches; an *epoch* is one pass over the training loader.
    Training ends at whichever of `n_epochs`, `max_steps` and `max_time` comes first.

    Args:
        n_epochs: Epochs in total, including those before resuming. Default: 1, or no limit if
            `max_steps` or `max_time` is given.
        max_steps: Optimizer steps in total, including those before resuming.
        max_time: Seconds of training since `fit` was called; stops after the current step.
        train_steps_per_epoch: Optimizer steps in an epoch. Default: one pass over the loader.
        gradient_accumulation_steps: Batches per optimizer step. The last group of an epoch may
            be smaller; its gradient is the mean over its batches.
        val_steps_per_epoch: Batches of each validation set in a validation run, on each rank.
            Default: all.
        val_every_n_steps: Validate every n optimizer steps instead of at the end of epochs; 0
            never validates. Default: at the end of each epoch.
        num_sanity_val_steps: Batches of each validation set to try before the first epoch. Their
            result is dropped, without a call of the epoch hooks, and random number generators are
            restored.
        gradient_clip_val: Largest L2 norm of the gradients of a model; of all models together that
            share an optimizer. `float("inf")` measures the norm without clipping. Default: neither.
        gradient_clip_algorithm: "norm" scales all gradients alike; "value" clamps each element to
            [-gradient_clip_val, gradient_clip_val].
        warm_up_batches: Batches at the beginning of the run that may end without an optimizer step,
            such as those that fill a replay buffer. Default: none.

    Raises:
        ValueError: If a number is out of range or two of them contradict each other.
    """

    n_epochs: int | None = None
    max_steps: int | None = None
    max_time: float | None = None
    train_steps_per_epoch: int | None = None
    gradient_accumulation_steps: int = 1
    val_steps_per_epoch: int | None = None
    val_every_n_steps: int | None = None
    num_sanity_val_steps: int = 0
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] = "norm"
    warm_up_batches: int = 0

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all numbers; `fit` calls it again, since fields may have been assigned.

        Raises:
            ValueError: If a number is out of range or two of them contradict each other.
        """
        lowest = {
            "val_every_n_steps": 0,
            "num_sanity_val_steps": 0,
            "val_steps_per_epoch": 0,
            "n_epochs": 0,
            "max_steps": 0,
            "warm_up_batches": 0,
        }
        if self.gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f'gradient_clip_algorithm={self.gradient_clip_algorithm!r}: "norm" or "value" is '
                "required"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "gradient_clip_algorithm":
                continue
            if field.name in ("max_time", "gradient_clip_val"):
                self._check_positive_number(field.name, value)
            elif value is not None or field.default is not None:
                self._check_count(field.name, value, lowest.get(field.name, 1))
        if self.max_steps is not None and (self.val_every_n_steps or 0) > self.max_steps > 0:
            raise ValueError(
                f"val_every_n_steps={self.val_every_n_steps} is more than "
                f"max_steps={self.max_steps}, so validation would never run; "
                "lower it, or set val_every_n_steps=0 to never validate"
            )

    @property
    def epoch_limit(self) -> float:
        """Epochs to train in total; infinite if only steps or seconds end the run."""
        if self.n_epochs is not None:
            return self.n_epochs
        return 1 if self.max_steps is None and self.max_time is None else math.inf

    @property
    def step_limit(self) -> float:
        """Optimizer steps to train in total; infinite without `max_steps`."""
        return math.inf if self.max_steps is None else self.max_steps

    @staticmethod
    def _check_count(name: str, value: object, lowest: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise ValueError(f"{name}={value!r}: a whole number of at least {lowest} is required")

    @staticmethod
    def _check_positive_number(name: str, value: object) -> None:
        if value is None:
            return
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not value > 0:  # type: ignore[operator]  # a number if is_number
            raise ValueError(f"{name}={value!r}: a number above 0 is required, or None for none")
