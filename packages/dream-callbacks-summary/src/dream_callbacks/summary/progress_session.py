"""Session: what the bar knows and says during one call of `fit`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from time import monotonic
from typing import Any

from dream_callbacks.summary import progress_text
from dream_callbacks.summary.display import Display
from dream_callbacks.summary.displayed_scalars import LateScalar
from dream_callbacks.summary.eta import place_of, seconds_left
from dream_callbacks.summary.smoothed_rate import Rate
from dream_callbacks.summary.text_layout import Bar, Piece, fitted, plain
from dream_trainer.callbacks import Every
from dream_trainer.trainer import BaseTrainer

_MOST_LINES_AT_ONCE = 5
_LINES_PER_S = 1.0
"""Lines that stay above a bar: epochs of milliseconds would push all else off the screen."""


class Session:
    """Keeps what happened since `fit` began, and shows how things stand.

    Args:
        trainer: In `fit`.
        smoothing: As that of ProgressBar.
        line_every: As that of ProgressBar.

    Attributes:
        has_trained: Whether a batch was trained.
    """

    def __init__(self, trainer: BaseTrainer, smoothing: float, line_every: Every) -> None:
        self._trainer = trainer
        self._began_s = monotonic()
        self._rate = Rate(smoothing)
        self._pace = Rate(smoothing / 10)  # the time that is left needn't follow every breath
        self._restart_clock()
        self.has_trained = False
        self._scalar = LateScalar()
        self._scalar_name: str | None = None
        self._validation: _Validation | None = None
        self._validated: tuple[int, Mapping[str, float]] | None = None
        self._validation_s: float | None = None
        self._untold_epoch: Mapping[str, float] | None = None
        self._untold_validation: Mapping[str, float] = {}
        self._untold: Sequence[Piece] | None = None
        self._lines_to_spend: float = _MOST_LINES_AT_ONCE
        self._told_s = self._began_s
        self._line_every = line_every
        self._cadence = line_every.start(trainer.global_step)
        self._display = Display()

    # What happens

    def begin_epoch(self) -> None:
        """The first batch of an epoch is waited for."""
        self._restart_clock()

    def trained_batch(self) -> None:
        """Another training batch is done, or several."""
        if self.has_trained:
            self._measure()
        else:  # the first one compiles and allocates; it says nothing about the others
            self._restart_clock()
            self.has_trained = True

    def end_epoch(self, means: Mapping[str, float]) -> None:
        """The batches of an epoch are done."""
        self._measure()
        self._untold_epoch = means
        if not self._display.is_live:
            self.tell_epoch()

    def begin_validation(self) -> None:
        """A validation run begins."""
        self._measure()
        self._validation = _Validation(self._trainer)

    def validated_batch(self, num_batches: int) -> None:
        """So many batches of the validation run are done."""
        if self._validation is not None:
            self._validation.num_done = num_batches

    def end_validation(self, result: Mapping[str, float]) -> None:
        """A validation run is done."""
        run, self._validation = self._validation, None
        self._restart_clock()
        if run is None or run.is_sanity_check:
            return
        self._validation_s = run.elapsed_s
        self._validated = (self._trainer.global_step, result)
        if self._untold_epoch is not None:
            self._untold_validation = result
        else:
            self._tell([*self._when(), *progress_text.values(result, is_validation=True)])

    def tell_epoch(self) -> None:
        """Say what came of an epoch, above a bar in one line with its validation."""
        means, self._untold_epoch = self._untold_epoch, None
        result, self._untold_validation = self._untold_validation, {}
        if means is not None:
            numbers = [
                *progress_text.values(means),
                *progress_text.values(result, is_validation=True),
            ]
            self._tell([*self._when(), *numbers, *self._speed()])

    def _measure(self) -> None:
        for rate in (self._rate, self._pace):
            rate.add(self._trainer.local_batches, monotonic())

    def _restart_clock(self) -> None:
        for rate in (self._rate, self._pace):
            rate.restart(self._trainer.local_batches, monotonic())

    # What is shown

    def draw(self, name: str | None, newest: Any) -> None:
        """Show how things stand.

        Args:
            name: Of the scalar to show.
            newest: The scalar, not read yet.
        """
        self._scalar_name = name
        self._scalar.read(newest)
        if self._display.is_live:
            self._draw_live()
        elif self._cadence.due(self._trainer.global_step):
            self._display.keep(plain(self._line()))

    def close(self, name: str | None, newest: Any) -> None:
        """Say how it ended and give the terminal back; arguments as those of `draw`."""
        try:
            if self._trainer.exception is None:  # after one, the device may be out of order
                self._scalar_name = name
                self._scalar.read(newest)
            self.tell_epoch()
            if self._untold is not None:
                self._display.keep(fitted(self._untold, self._display.width))
            if self._display.is_live:
                self._draw_live()
            elif self._trainer.counters.epoch_stage == "train":
                self._display.keep(plain(self._line()))
        finally:
            self._display.close()
        for piece in progress_text.ending(self._trainer):
            self._display.keep(plain([piece]))

    def _draw_live(self) -> None:
        lines = [self._training()]
        if self._trainer.validates:  # the same number of lines all the time
            lines.append(self._validating())
        width, ascii_only = self._display.width, self._display.ascii_only
        self._display.show([fitted(line, width, ascii_only=ascii_only) for line in lines])

    def _tell(self, pieces: Sequence[Piece]) -> None:
        """Write a line that stays; above a bar not too many of them."""
        pieces, now_s = [*pieces, self._elapsed()], monotonic()
        earned = (now_s - self._told_s) * _LINES_PER_S
        self._lines_to_spend = min(self._lines_to_spend + earned, _MOST_LINES_AT_ONCE)
        self._told_s = now_s
        if not self._display.is_live:
            self._display.keep(plain(pieces))
            self._cadence = self._line_every.start(self._trainer.global_step)
        elif self._lines_to_spend >= 1:
            self._display.keep(fitted(pieces, self._display.width))
            self._lines_to_spend -= 1
            self._untold = None
        else:
            self._untold = pieces

    def _line(self) -> list[Piece | Bar]:
        """How things stand, in one line."""
        if self._validation is None:
            return self._training()
        return [progress_text.epoch(place_of(self._trainer)), *self._validating()]

    def _training(self) -> list[Piece | Bar]:
        place = place_of(self._trainer)
        return [
            progress_text.epoch(place),
            *progress_text.bar(place.fraction),
            progress_text.count(place.steps, place.num_steps, "steps"),
            *self._speed(),
            self._elapsed(),
            *self._left(),
            *self._newest(),
        ]

    def _validating(self) -> list[Piece | Bar]:
        if self._validation is not None:
            return self._validation.line()
        if self._validated is None:
            return []
        step, result = self._validated
        return [
            progress_text.label("validation"),
            *progress_text.values(result),
            progress_text.result_of_step(step),
        ]

    def _when(self) -> tuple[Piece, Piece]:
        trainer = self._trainer
        max_steps = trainer.training_parameters.max_steps
        return progress_text.epoch(place_of(trainer)), progress_text.at_step(
            trainer.global_step, max_steps
        )

    def _newest(self) -> Iterator[Piece]:
        if self._scalar_name is not None and self._scalar.value is not None:
            yield from progress_text.values({self._scalar_name: self._scalar.value})

    def _speed(self) -> Iterator[Piece]:
        accumulation = self._trainer.training_parameters.gradient_accumulation_steps
        return progress_text.steps_per_s(self._rate.per_second, accumulation)

    def _elapsed(self) -> Piece:
        return progress_text.elapsed(monotonic() - self._began_s)

    def _left(self) -> Iterator[Piece]:
        return progress_text.left(
            seconds_left(
                self._trainer,
                batches_per_s=self._pace.per_second,
                validation_s=self._validation_s,
                elapsed_s=monotonic() - self._began_s,
            )
        )


class _Validation:
    """A validation run that goes on."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self.num_done = 0
        self.is_sanity_check = trainer.local_batches == 0
        self._began_s = monotonic()
        self._total = trainer.num_val_batches
        if self.is_sanity_check:
            wanted = trainer.training_parameters.num_sanity_val_steps
            self._total = min(wanted, self._total or wanted)

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._began_s

    def line(self) -> list[Piece | Bar]:
        return [
            progress_text.label("try-out" if self.is_sanity_check else "validation"),
            *progress_text.bar(self.num_done / self._total if self._total else None),
            progress_text.count(self.num_done, self._total, "batches"),
            progress_text.elapsed(self.elapsed_s),
        ]
