"""ProgressBar: how far training has come, how fast it goes, and when it will be done."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from dream_callbacks.summary.displayed_scalars import numbers_in, scalar_to_show
from dream_callbacks.summary.progress_session import Session
from dream_trainer.callbacks import Every, RankZeroCallback
from dream_trainer.trainer import BaseTrainer

logger = logging.getLogger(__name__)

_EVERY_30_S = Every(seconds=30)
_INTERVAL_S = 0.2
_MAX_INTERVAL_S = 1.0
_COST_FACTOR = 20
"""Drawing in a slow terminal takes one in so many seconds, unless it comes to _MAX_INTERVAL_S."""


class ProgressBar(RankZeroCallback[BaseTrainer]):
    """Shows a bar in a terminal or a notebook, and lines in a file.

    The bar tells the epoch, its optimizer steps, steps per second, the time since `fit` began and
    the time until it ends, a scalar of the last step's result, and below that the validation that
    runs or the result of the last one. Above it stays a line for each epoch and each validation,
    at most one per second in the long run; and what else is printed, logged or warned of. Where
    stdout is no terminal there are only those lines, all of them, and others in between if they
    are far apart.

    Costs a look at the clock per batch. Five times a second at most it reads the scalar on the
    host, in the training thread, and draws; a scalar on a CUDA device is copied without waiting
    for it and shown one drawing later. No collectives.

    Args:
        smoothing: Of the steps per second: weight of the newest measurement against all before
            it. 0 shows the mean since training began, 1 the last measurement. The time that is
            left is told from the speed smoothed with a tenth of it.
        metric: Entry of the training step's result to show. Default: "loss", else the first scalar
            that has "loss" in its name, else the first.
        line_every: How often to write a line where stdout is no terminal and there has been none;
            looked at a few times per second.

    Raises:
        ValueError: If `smoothing` isn't from 0 to 1.
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        metric: str | None = None,
        *,
        line_every: Every = _EVERY_30_S,
    ) -> None:
        if not 0 <= smoothing <= 1:
            raise ValueError(
                f"smoothing={smoothing!r}: a number from 0 (mean since training began) to 1 (last "
                "measurement alone) is required"
            )
        self.smoothing = smoothing
        self.metric = metric
        self.line_every = line_every
        self._session: Session | None = None
        self._key = metric
        self._newest: Any = None
        self._due_s = self._soonest_s = 0.0
        self._has_warned = False

    def pre_fit(self) -> None:
        self._end()
        self._key, self._newest, self._due_s = self.metric, None, 0.0
        try:
            self._draw()
        except BaseException:
            self._end()  # post_fit is only called if this returns
            raise

    def pre_train_epoch(self) -> None:
        self._running.begin_epoch()
        self._draw(soon=True)
        if not self._running.has_trained:
            self._due_s = 0.0  # the first step starts the clock

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        newest = result.get(self._key)  # type: ignore[arg-type]  # None is no key, as it should
        if newest is not None:
            self._newest = newest
        if monotonic() >= self._due_s:
            if self._newest is None and not self.trainer.is_accumulating_gradients:
                self._look_for_metric(result)
            self._running.trained_batch()
            self._draw()

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        if self._newest is None:
            self._look_for_metric(result)
        self._running.end_epoch(numbers_in(result))

    def pre_validation_epoch(self) -> None:
        self._running.begin_validation()
        self._draw(soon=True)

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if monotonic() >= self._due_s:
            self._running.validated_batch(batch_idx + 1)
            self._draw()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._running.end_validation(numbers_in(result))
        self._draw(soon=True)

    def post_epoch(self) -> None:
        self._running.tell_epoch()

    def post_fit(self) -> None:
        self._end()

    def __getstate__(self) -> dict[str, Any]:
        # What is drawn on a terminal can't be copied; a copy begins its own.
        return {**super().__getstate__(), "_session": None, "_newest": None}

    @property
    def _running(self) -> Session:
        if self._session is None:  # pre_fit, or added to a run that has begun
            self._session = Session(self.trainer, self.smoothing, self.line_every)
        return self._session

    def _draw(self, *, soon: bool = False) -> None:
        """Draw, and say when to do so again; `soon` if the last time was cheap or long ago."""
        begin_s = monotonic()
        if soon and begin_s < self._soonest_s:
            return
        self._running.draw(self._key, self._newest)
        pause_s = min(_COST_FACTOR * (monotonic() - begin_s), _MAX_INTERVAL_S)
        self._soonest_s = begin_s + pause_s
        self._due_s = begin_s + max(pause_s, _INTERVAL_S)

    def _look_for_metric(self, result: dict[str, Any]) -> None:
        if self.metric is None:
            self._key = scalar_to_show(result)
            self._newest = result.get(self._key) if self._key is not None else None
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "ProgressBar(metric=%r): training_step returned %s; name one of them, or leave "
                "metric out",
                self.metric,
                ", ".join(result) or "nothing",
            )

    def _end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close(self._key, self._newest)
        self._newest = None
