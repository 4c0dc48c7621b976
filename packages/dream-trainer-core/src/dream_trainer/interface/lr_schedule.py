"""LRSchedule: a learning rate scheduler, and when it is stepped."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

Interval = Literal["step", "epoch", "validation", "manual"]

_METHODS = ("step", "state_dict", "load_state_dict")


def is_scheduler(value: Any) -> bool:
    """Whether the class of a value has the methods of a scheduler, and isn't an optimizer's."""
    kind = type(value)
    return all(callable(getattr(kind, name, None)) for name in _METHODS) and not (
        isinstance(value, Optimizer) or hasattr(kind, "zero_grad")
    )


@dataclass(frozen=True, eq=False)
class LRSchedule:
    """A learning rate scheduler, and when it is stepped. Return it from `configure_schedulers`.

    Args:
        scheduler: One of torch's, or any object with `step`, `state_dict` and `load_state_dict`.
        interval: "step": after each step of its optimizer. "epoch": at the end of each epoch,
            after its validation and before `post_epoch`. "validation": after each validation run
            of `fit`, before `post_validation_epoch`. "manual": never, so that you call `step`; its
            state is saved. Default: "epoch" with a monitor; without one "step", and "manual" for
            ReduceLROnPlateau.
        monitor: Key of a result that is passed to `step`, as ReduceLROnPlateau requires. With
            "epoch" it is taken from the last validation run in the epoch, or from the result of
            the training epoch if validation doesn't report it. Rank 0's value is used on all
            ranks.
        optimizer: The optimizer whose steps it follows. Default: the one that the scheduler refers
            to, or the only one.

    Raises:
        TypeError: If the scheduler lacks a method, or its `step` can't be called so.
        ValueError: If `interval` and `monitor` exclude each other.
    """

    scheduler: Any
    interval: Interval | None = None
    monitor: str | None = None
    optimizer: Optimizer | None = None

    def __post_init__(self) -> None:
        kind = type(self.scheduler).__name__
        if not is_scheduler(self.scheduler):
            raise TypeError(
                f"LRSchedule of a {kind}; an object with step, state_dict and load_state_dict is "
                "required"
            )
        is_plateau = isinstance(self.scheduler, ReduceLROnPlateau)
        if self.interval is None:
            without_monitor = "manual" if is_plateau else "step"
            interval = "epoch" if self.monitor is not None else without_monitor
            object.__setattr__(self, "interval", interval)
        if self.interval not in get_args(Interval):
            raise ValueError(
                f'interval={self.interval!r}: "step", "epoch", "validation" or "manual" is required'
            )
        by_result = self.interval in ("epoch", "validation")
        if self.monitor is not None and not by_result:
            raise ValueError(
                f"monitor={self.monitor!r} with interval={self.interval!r}: there is a result once "
                'per epoch and validation run; set interval="epoch" or "validation"'
            )
        if is_plateau and self.monitor is None and self.interval != "manual":
            raise ValueError(
                f"{kind} with interval={self.interval!r} needs the result to reduce on; set "
                'monitor, as in LRSchedule(scheduler, monitor="val_loss")'
            )
        if self.interval != "manual":
            self._check_step(kind)

    @property
    def options(self) -> tuple[str | None, str | None]:
        """Interval and monitor."""
        return self.interval, self.monitor

    def _check_step(self, kind: str) -> None:
        arguments = () if self.monitor is None else (0.0,)
        try:
            signature = inspect.signature(self.scheduler.step)
        except ValueError:  # an extension type that doesn't show its signature
            return
        if not _accepts(signature, arguments):
            called = "step()" if self.monitor is None else "step(value)"
            raise TypeError(
                f"{kind}.step{signature} can't be called as {called}; if it needs a result, write "
                'LRSchedule(scheduler, monitor="val_loss"); if it needs something else, return '
                'LRSchedule(scheduler, interval="manual") from configure_schedulers and call it in '
                "training_step or a callback"
            )


def _accepts(signature: inspect.Signature, arguments: tuple[float, ...]) -> bool:
    try:
        return "epoch" not in signature.bind(*arguments).arguments  # an epoch isn't a result
    except TypeError:
        return False
