"""Phrases: what is said of a run, in pieces of a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dream_callbacks.summary.text_layout import Bar, Piece, duration, number, speed

if TYPE_CHECKING:
    from dream_callbacks.summary.eta import Place
    from dream_trainer.trainer import AbstractTrainer

# What stays where there is no room for all; of numbers, the first ones.
_WHERE, _HOW_FAR, _NUMBER, _LEFT, _SPEED, _BAR, _ELAPSED, _WHEN = 90, 80, 70, 40, 30, 20, 10, 5

_LABEL_WIDTH = len("validation")


def epoch(place: Place) -> Piece:
    """Which epoch: "epoch 2/10"."""
    of = "" if place.num_epochs is None else f"/{place.num_epochs}"
    return Piece(f"{f'epoch {place.epoch}{of}':<{_LABEL_WIDTH}}", "bold", _WHERE)


def label(text: str) -> Piece:
    """What a line is about, as wide as most epochs are."""
    return Piece(f"{text:<{_LABEL_WIDTH}}", "dim", _WHERE)


def count(done: int, total: int | None, unit: str) -> Piece:
    """How many of how many: "312/1,000 steps"."""
    if total is None:
        return Piece(f"{done:,} {unit}", "", _HOW_FAR)
    return Piece(f"{done:>{len(f'{total:,}')},}/{total:,} {unit}", "", _HOW_FAR)


def bar(fraction: float | None) -> Iterator[Bar]:
    """A bar, if it is known how much is done."""
    if fraction is not None:
        yield Bar(fraction, _BAR)


def at_step(step: int, max_steps: int | None) -> Piece:
    """When, in optimizer steps of the run: "step 1,312"; "step 1,312/5,000" if they limit it."""
    of = "" if max_steps is None else f"/{max_steps:,}"
    return Piece(f"step {step:,}{of}", "", _HOW_FAR)


def result_of_step(step: int) -> Piece:
    """Since when a number stands there."""
    return Piece(f"at step {step:,}", "dim", _WHEN)


def values(numbers: Mapping[str, float], *, is_validation: bool = False) -> Iterator[Piece]:
    """Names and numbers: "loss 1.823"; "val accuracy 0.4310" if they are told beside others."""
    for index, (name, value) in enumerate(numbers.items()):
        prefix = "val " if is_validation and not name.startswith("val") else ""
        yield Piece(f"{prefix}{name} {number(value)}", "cyan", _NUMBER - min(index, 20))


def steps_per_s(batches_per_s: float | None, accumulation: int) -> Iterator[Piece]:
    """How fast, if that is known: "48.2 steps/s"."""
    if batches_per_s:
        yield Piece(speed(batches_per_s / accumulation), "", _SPEED)


def elapsed(seconds: float) -> Piece:
    """For how long: "1:05"."""
    return Piece(duration(seconds), "dim", _ELAPSED)


def left(seconds: float | None) -> Iterator[Piece]:
    """For how much longer, if that is known and it isn't over: "12:40 left"."""
    if seconds:
        yield Piece(f"{duration(seconds)} left", "", _LEFT)


def ending(trainer: AbstractTrainer) -> Iterator[Piece]:
    """Why a run ended before its time, if it did."""
    error, step = trainer.exception, f"{trainer.global_step:,}"
    if isinstance(error, KeyboardInterrupt):
        yield Piece(f"interrupted at step {step}", "yellow")
    elif error is not None:
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0]
        yield Piece(f"failed at step {step}: {first_line}", "red")
    elif trainer.stop_reason is not None:
        yield Piece(f"stopped at step {step}: {trainer.stop_reason}", "yellow")
