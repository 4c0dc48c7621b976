"""ProgressSession: state and output of the progress bar during one call, such as `fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from dream_callbacks.summary import progress_text
from dream_callbacks.summary.display import Display
from dream_callbacks.summary.displayed_scalars import AsyncScalar
from dream_callbacks.summary.eta import epoch_progress, seconds_left
from dream_callbacks.summary.smoothed_rate import SmoothedRate
from dream_callbacks.summary.text_layout import Bar, Piece, fit_line, plain_line
from dream_trainer.callbacks import Every
from dream_trainer.trainer import BaseTrainer

_MOST_LINES_AT_ONCE = 5
_LINES_PER_S = 1.0
"""Rate limit of lines above a bar; epochs of milliseconds would fill the screen."""


class ProgressSession:
    """Tracks the progress of one `fit`, `validate`, `test` or `predict` and displays it.

    Args:
        trainer: The trainer, in that call.
        smoothing: `smoothing` of ProgressBar.
        line_every: `line_every` of ProgressBar.

    Attributes:
        has_trained: Whether a training batch has completed.
    """

    def __init__(self, trainer: BaseTrainer, smoothing: float, line_every: Every) -> None:
        self._trainer = trainer
        self._trains = trainer.running in ("fit", None)
        self._start_s = monotonic()
        self._rate = SmoothedRate(smoothing)
        self._eta_rate = SmoothedRate(smoothing / 10)  # the remaining time should not fluctuate
        self._restart_clock()
        self.has_trained = False
        self._scalar = AsyncScalar()
        self._metric_name: str | None = None
        self._validation: _ValidationRun | None = None
        self._last_validation: tuple[int, Mapping[str, float]] | None = None
        self._validation_s: float | None = None
        self._pending_epoch: Mapping[str, float] | None = None
        self._pending_validation: Mapping[str, float] = {}
        self._skipped_line: Sequence[Piece] | None = None
        self._line_budget: float = _MOST_LINES_AT_ONCE
        self._last_line_s = self._start_s
        self._line_every = line_every
        self._cadence = line_every.start(trainer.global_step)
        self._display = Display()

    # Updates

    def begin_epoch(self) -> None:
        """Start an epoch, before its first batch is loaded."""
        self._validation = None  # a sanity validation has no end
        self._restart_clock()

    def update_training(self) -> None:
        """Count the training batches completed since the last call."""
        if self.has_trained:
            self._measure()
        else:  # the first batch compiles and allocates, so it isn't measured
            self._restart_clock()
            self.has_trained = True

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """End the training batches of an epoch."""
        self._measure()
        self._pending_epoch = means
        if not self._display.is_live:
            self.write_epoch()

    def begin_validation(self) -> None:
        """Start a validation run."""
        self._measure()
        self._validation = _ValidationRun(self._trainer)

    @property
    def is_evaluating(self) -> bool:
        """Whether a validation run has begun and not ended."""
        return self._validation is not None

    def update_validation(self, num_batches: int) -> None:
        """Set the number of completed batches of the validation run."""
        if self._validation is not None:
            self._validation.num_done = num_batches

    def end_validation(self, result: Mapping[str, float]) -> None:
        """End a validation run."""
        run, self._validation = self._validation, None
        self._restart_clock()
        if run is None:
            return
        if not self._trains:
            self._write([*run.position(), *progress_text.values(result), self._at_step()])
            return
        self._validation_s = run.elapsed_s
        self._last_validation = (self._trainer.global_step, result)
        if self._pending_epoch is not None:
            self._pending_validation = result
        else:
            self._write([*self._position(), *progress_text.values(result, is_validation=True)])

    def write_epoch(self) -> None:
        """Write the line of an epoch; above a bar, it includes the validation."""
        means, self._pending_epoch = self._pending_epoch, None
        result, self._pending_validation = self._pending_validation, {}
        if means is not None:
            numbers = [
                *progress_text.values(means),
                *progress_text.values(result, is_validation=True),
            ]
            self._write([*self._position(), *numbers, *self._speed()])

    def _measure(self) -> None:
        for rate in (self._rate, self._eta_rate):
            rate.add(self._trainer.local_batches, monotonic())

    def _restart_clock(self) -> None:
        for rate in (self._rate, self._eta_rate):
            rate.restart(self._trainer.local_batches, monotonic())

    # Output

    def draw(self, name: str | None, latest: Any) -> None:
        """Show the current progress.

        Args:
            name: Name of the scalar to show.
            latest: Value of the scalar, possibly still on the device.
        """
        self._metric_name = name
        self._scalar.read(latest)
        if self._display.is_live:
            self._draw_live()
        elif self._trains and self._cadence.due(self._trainer.global_step):
            self._display.write_line(plain_line(self._status_line()))

    def close(self, name: str | None, latest: Any) -> None:
        """Write how the run ended and restore the streams; arguments as for `draw`."""
        try:
            if self._trainer.exception is None:  # after an error, reading from the device may fail
                self._metric_name = name
                self._scalar.read(latest)
            self.write_epoch()
            if self._skipped_line is not None:
                self._display.write_line(fit_line(self._skipped_line, self._display.width))
            if not self._trains:
                self._close_evaluation()
            elif self._display.is_live:
                self._draw_live()
            elif self._trainer.counters.epoch_stage == "train":
                self._display.write_line(plain_line(self._status_line()))
        finally:
            self._display.close()
        for piece in progress_text.ending(self._trainer):
            self._display.write_line(plain_line([piece]))

    def _close_evaluation(self) -> None:
        """Write the line of an evaluation without a result, and leave no bar."""
        if self._validation is not None:
            self._write(self._validation.position())
        if self._display.is_live:
            self._display.show([])

    def _draw_live(self) -> None:
        lines = [self._training_line()] if self._trains else []
        if self._trainer.validates or not self._trains:  # the number of lines must not change
            lines.append(self._validation_line())
        width, ascii_only = self._display.width, self._display.ascii_only
        self._display.show([fit_line(line, width, ascii_only=ascii_only) for line in lines])

    def _write(self, pieces: Sequence[Piece]) -> None:
        """Write a permanent line; above a bar, rate-limited."""
        pieces, now_s = [*pieces, self._elapsed()], monotonic()
        refill = (now_s - self._last_line_s) * _LINES_PER_S
        self._line_budget = min(self._line_budget + refill, _MOST_LINES_AT_ONCE)
        self._last_line_s = now_s
        if not self._display.is_live:
            self._display.write_line(plain_line(pieces))
            self._cadence = self._line_every.start(self._trainer.global_step)
        elif self._line_budget >= 1:
            self._display.write_line(fit_line(pieces, self._display.width))
            self._line_budget -= 1
            self._skipped_line = None
        else:
            self._skipped_line = pieces

    def _status_line(self) -> list[Piece | Bar]:
        """The current progress in one line."""
        if self._validation is None:
            return self._training_line()
        return [progress_text.epoch(epoch_progress(self._trainer)), *self._validation_line()]

    def _training_line(self) -> list[Piece | Bar]:
        progress = epoch_progress(self._trainer)
        return [
            progress_text.epoch(progress),
            *progress_text.bar(progress.fraction),
            progress_text.count(progress.steps, progress.num_steps, "steps"),
            *self._speed(),
            self._elapsed(),
            *self._time_left(),
            *self._metric(),
        ]

    def _validation_line(self) -> list[Piece | Bar]:
        if self._validation is not None:
            return self._validation.line()
        if self._last_validation is None:
            return []
        step, result = self._last_validation
        return [
            progress_text.label("validation"),
            *progress_text.values(result),
            progress_text.result_of_step(step),
        ]

    def _at_step(self) -> Piece:
        return progress_text.result_of_step(self._trainer.global_step)

    def _position(self) -> tuple[Piece, Piece]:
        trainer = self._trainer
        max_steps = trainer.training_parameters.max_steps
        return progress_text.epoch(epoch_progress(trainer)), progress_text.at_step(
            trainer.global_step, max_steps
        )

    def _metric(self) -> Iterator[Piece]:
        if self._metric_name is not None and self._scalar.value is not None:
            yield from progress_text.values({self._metric_name: self._scalar.value})

    def _speed(self) -> Iterator[Piece]:
        accumulation = self._trainer.training_parameters.gradient_accumulation_steps
        return progress_text.steps_per_s(self._rate.per_second, accumulation)

    def _elapsed(self) -> Piece:
        return progress_text.elapsed(monotonic() - self._start_s)

    def _time_left(self) -> Iterator[Piece]:
        return progress_text.left(
            seconds_left(
                self._trainer,
                batches_per_s=self._eta_rate.per_second,
                validation_s=self._validation_s,
                elapsed_s=monotonic() - self._start_s,
            )
        )


class _ValidationRun:
    """A validation run, or another evaluation, in progress."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.num_done = 0
        self._trainer = trainer
        self._start_s = monotonic()

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._start_s

    def position(self) -> list[Piece]:
        """What has been evaluated: "test  12 batches"."""
        return [self._label(), progress_text.count(self.num_done, None, "batches")]

    def line(self) -> list[Piece | Bar]:
        total = self._trainer.num_val_batches
        return [
            self._label(self._trainer.validation_set),
            *progress_text.bar(self.num_done / total if total else None),
            progress_text.count(self.num_done, total, "batches"),
            progress_text.elapsed(self.elapsed_s),
        ]

    def _label(self, name: str | None = None) -> Piece:
        call = self._trainer.running
        what: str = call if call in ("test", "predict") else "validation"
        what = "sanity" if self._trainer.is_sanity_validating else what
        return progress_text.label(f"{what} {name}" if name else what)
