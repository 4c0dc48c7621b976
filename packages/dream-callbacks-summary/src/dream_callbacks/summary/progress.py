"""ProgressBar: progress, speed and remaining time of training."""

from __future__ import annotations

import logging
from time import monotonic
from typing import Any

from dream_callbacks.summary.displayed_scalars import default_metric, read_scalars
from dream_callbacks.summary.progress_session import ProgressSession
from dream_trainer.callbacks import Every, RankZeroCallback
from dream_trainer.trainer import BaseTrainer

logger = logging.getLogger(__name__)

_EVERY_30_S = Every(seconds=30)
_INTERVAL_S = 0.2
_MAX_INTERVAL_S = 1.0
_COST_FACTOR = 20
"""The interval is at least this many times the drawing time, up to _MAX_INTERVAL_S."""


class ProgressBar(RankZeroCallback[BaseTrainer]):
    """Shows a progress bar in a terminal or a notebook, and lines in a file.

    The bar shows the epoch, its optimizer steps, steps per second, elapsed and remaining time, a
    scalar of the last step's result, and below that the current validation run or the result of
    the last one. `validate`, `test` and `predict` have a bar of their own. Above the bar, one line
    is written for each epoch and each validation (at most one per second on average), as well as
    everything else that is printed, logged or warned about. If stdout is not a terminal, all these
    lines are written without a bar, with additional lines in between if they are far apart.

    Costs one clock read per batch. At most five times per second it reads the scalar on the host,
    in the training thread, and draws. A scalar on a CUDA device is copied asynchronously and shown
    at the next drawing. No collectives.

    Args:
        smoothing: Weight of the latest measurement of the steps per second. 0 shows the mean since
            training began, 1 the last measurement. The remaining time is estimated with a tenth
            of it.
        metric: Key of the training step's result to show. Default: "loss", else the first scalar
            with "loss" in its name, else the first scalar.
        line_every: How often to write a line if stdout is not a terminal and no other line was
            written; checked a few times per second.

    Raises:
        ValueError: If `smoothing` isn't between 0 and 1.
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
                "measurement only) is required"
            )
        self.smoothing = smoothing
        self.metric = metric
        self.line_every = line_every
        self._session: ProgressSession | None = None
        self._key = metric
        self._latest: Any = None
        self._num_evaluated = 0
        self._due_s = self._earliest_s = 0.0
        self._has_warned = False

    def pre_fit(self) -> None:
        self._close()
        self._key, self._latest, self._due_s = self.metric, None, 0.0
        try:
            self._draw()
        except BaseException:
            self._close()  # post_fit isn't called after an error here
            raise

    def pre_train_epoch(self) -> None:
        self._active_session.begin_epoch()
        self._draw(soon=True)
        if not self._active_session.has_trained:
            self._due_s = 0.0  # the first step starts the clock

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        latest = result.get(self._key)  # type: ignore[arg-type]  # None is never a key
        if latest is not None:
            self._latest = latest
        if monotonic() >= self._due_s:
            if self._latest is None and not self.trainer.is_accumulating_gradients:
                self._find_metric(result)
            self._active_session.update_training()
            self._draw()

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        if self._latest is None:
            self._find_metric(result)
        self._active_session.end_epoch(read_scalars(result))

    def pre_validation_epoch(self) -> None:
        self._begin_evaluation()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._session is None or not self._session.is_evaluating:
            self._begin_evaluation()  # no hook comes before a sanity validation and `predict`
        self._num_evaluated += 1
        if monotonic() >= self._due_s:
            self._active_session.update_validation(self._num_evaluated)
            self._draw()

    def _begin_evaluation(self) -> None:
        if self._session is None and self.trainer.running != "fit":
            self.trainer.at_end(self._close)
        self._num_evaluated = 0
        self._active_session.begin_validation()
        self._draw(soon=True)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._active_session.update_validation(self._num_evaluated)
        self._active_session.end_validation(read_scalars(result))
        self._draw(soon=True)

    def post_epoch(self) -> None:
        self._active_session.write_epoch()

    def post_fit(self) -> None:
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        # The display can't be copied; a copy opens its own.
        return {**super().__getstate__(), "_session": None, "_latest": None}

    @property
    def _active_session(self) -> ProgressSession:
        if self._session is None:  # in pre_fit, or if the callback was added during the run
            self._session = ProgressSession(self.trainer, self.smoothing, self.line_every)
        return self._session

    def _draw(self, *, soon: bool = False) -> None:
        """Draw and schedule the next drawing; `soon` skips it if the last one was recent."""
        begin_s = monotonic()
        if soon and begin_s < self._earliest_s:
            return
        self._active_session.draw(self._key, self._latest)
        pause_s = min(_COST_FACTOR * (monotonic() - begin_s), _MAX_INTERVAL_S)
        self._earliest_s = begin_s + pause_s
        self._due_s = begin_s + max(pause_s, _INTERVAL_S)

    def _find_metric(self, result: dict[str, Any]) -> None:
        if self.metric is None:
            self._key = default_metric(result)
            self._latest = result.get(self._key) if self._key is not None else None
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(
                "ProgressBar(metric=%r): training_step returned %s; choose one of these keys, or "
                "leave metric out",
                self.metric,
                ", ".join(result) or "nothing",
            )

    def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.update_validation(self._num_evaluated)
            session.close(self._key, self._latest)
        self._latest = None
