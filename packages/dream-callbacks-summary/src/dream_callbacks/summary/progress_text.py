"""Text of progress lines, as pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dream_callbacks.summary.text_layout import (
    Bar,
    Piece,
    format_duration,
    format_number,
    format_speed,
)

if TYPE_CHECKING:
    from dream_callbacks.summary.eta import EpochProgress
    from dream_trainer.trainer import AbstractTrainer

# Importance of the pieces; earlier numbers are more important than later ones.
_LABEL, _COUNT, _NUMBER, _ETA, _SPEED, _BAR, _ELAPSED, _STEP = 90, 80, 70, 40, 30, 20, 10, 5

_LABEL_WIDTH = len("validation")


def epoch(progress: EpochProgress) -> Piece:
    """The epoch: "epoch 2/10"."""
    of = "" if progress.num_epochs is None else f"/{progress.num_epochs}"
    return Piece(f"{f'epoch {progress.epoch}{of}':<{_LABEL_WIDTH}}", "bold", _LABEL)


def label(text: str) -> Piece:
    """The label of a line, padded to the width of most epochs."""
    return Piece(f"{text:<{_LABEL_WIDTH}}", "dim", _LABEL)


def count(done: int, total: int | None, unit: str) -> Piece:
    """Completed and total count: "312/1,000 steps"."""
    if total is None:
        return Piece(f"{done:,} {unit}", "", _COUNT)
    return Piece(f"{done:>{len(f'{total:,}')},}/{total:,} {unit}", "", _COUNT)


def bar(fraction: float | None) -> Iterator[Bar]:
    """A bar, if the fraction is known."""
    if fraction is not None:
        yield Bar(fraction, _BAR)


def at_step(step: int, max_steps: int | None) -> Piece:
    """The optimizer step of the run: "step 1,312", or "step 1,312/5,000" with `max_steps`."""
    of = "" if max_steps is None else f"/{max_steps:,}"
    return Piece(f"step {step:,}{of}", "", _COUNT)


def result_of_step(step: int) -> Piece:
    """The step at which a result was computed: "at step 1,312"."""
    return Piece(f"at step {step:,}", "dim", _STEP)


def values(numbers: Mapping[str, float], *, is_validation: bool = False) -> Iterator[Piece]:
    """Names and numbers: "loss 1.823"; "val accuracy 0.4310" for validation."""
    for index, (name, value) in enumerate(numbers.items()):
        prefix = "val " if is_validation and not name.startswith("val") else ""
        yield Piece(f"{prefix}{name} {format_number(value)}", "cyan", _NUMBER - min(index, 20))


def steps_per_s(batches_per_s: float | None, accumulation: int) -> Iterator[Piece]:
    """The speed, if known: "48.2 steps/s"."""
    if batches_per_s:
        yield Piece(format_speed(batches_per_s / accumulation), "", _SPEED)


def elapsed(seconds: float) -> Piece:
    """Elapsed time: "1:05"."""
    return Piece(format_duration(seconds), "dim", _ELAPSED)


def left(seconds: float | None) -> Iterator[Piece]:
    """Remaining time, if known and not zero: "12:40 left"."""
    if seconds:
        yield Piece(f"{format_duration(seconds)} left", "", _ETA)


def ending(trainer: AbstractTrainer) -> Iterator[Piece]:
    """Why a run ended early, if it did."""
    error, step = trainer.exception, f"{trainer.global_step:,}"
    if isinstance(error, KeyboardInterrupt):
        yield Piece(f"interrupted at step {step}", "yellow")
    elif error is not None:
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Piece(f"failed at step {step}: {first_line}", "red")
    elif trainer.stop_reason is not None:
        yield Piece(f"stopped at step {step}: {trainer.stop_reason}", "yellow")
