"""Every: cadence in steps, epochs or seconds."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Every:
    """A cadence; with several units, whichever comes first.

    Args:
        steps: Interval in optimizer steps.
        epochs: Interval in epochs.
        seconds: Interval in seconds. Clocks differ between ranks: where all of them must act
            together, let one rank decide.

    Raises:
        ValueError: If no unit is given, or a number isn't above 0.
    """

    steps: int | None = None
    epochs: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("Every() never happens; give it steps=…, epochs=… or seconds=…")
        for name, value in given.items():
            kinds = (int, float) if name == "seconds" else int
            is_number = isinstance(value, kinds) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                kind = "a number" if name == "seconds" else "a whole number"
                raise ValueError(f"Every({name}={value!r}): {kind} above 0 is required")

    def due(self, step: int) -> bool:
        """Whether `step` is a multiple of `steps`.

        Only for a cadence in steps, and to be called once per step: with gradient accumulation
        several batches have the same step, and with several updates in a batch steps are passed
        over. `start` gives a Cadence that keeps count, and is due when a multiple is passed.

        Raises:
            ValueError: If this cadence isn't in steps alone.
        """
        if self.steps is None or self.epochs is not None or self.seconds is not None:
            raise ValueError(
                f"{self} isn't in steps alone; call start() and use the due() of what it returns"
            )
        return step > 0 and step % self.steps == 0

    def start(self, step: int = 0, epoch: int = 0) -> Cadence:
        """A Cadence that counts from `step` completed steps and `epoch` completed epochs."""
        return Cadence(self, step, epoch)


class Cadence:
    """Tells once per interval that an action is due. Made by `Every.start`.

    Args:
        every: The interval.
        step: Optimizer steps completed at the start.
        epoch: Epochs completed at the start.
    """

    def __init__(self, every: Every, step: int, epoch: int) -> None:
        self.every = every
        self._step = step
        self._epoch = epoch
        self._time_s = time.monotonic()

    def due(self, step: int, epoch: int | None = None) -> bool:
        """Whether a multiple of steps or epochs, or the time, was passed since the last True.

        Args:
            step: Optimizer steps completed.
            epoch: Epochs completed; None if no epoch has ended since the last call.
        """
        epoch = self._epoch if epoch is None else epoch
        every = self.every
        is_due = (
            (every.steps is not None and step // every.steps > self._step // every.steps)
            or (every.epochs is not None and epoch // every.epochs > self._epoch // every.epochs)
            or (every.seconds is not None and time.monotonic() - self._time_s >= every.seconds)
        )
        if is_due:
            self._step, self._epoch, self._time_s = step, epoch, time.monotonic()
        return is_due
