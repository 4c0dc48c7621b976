"""CheckpointParameters: when to save, what to keep, what to resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dream_callbacks.checkpoint.retention import KeepRules
from dream_trainer.callbacks import Every

DEFAULT_EVERY = Every(epochs=1, seconds=1800)


@dataclass(kw_only=True)
class CheckpointParameters:
    """When to save, what to keep, and what to resume: three separate matters.

    A save also happens at the end of the run, before it ends on a signal, and, with
    `keep_top_k`, whenever a validation gives one of the best results.

    Args:
        root_dir: Where run directories lie: checkpoints are in
            `root_dir/project/group/experiment/checkpoints`. Default: the trainer's root_dir. May
            be a URL that fsspec knows, such as "s3://bucket/runs".
        every: How often to save. Default: each epoch, and every half hour.
        checkpoint_every_n_train_epochs: Instead of `every`: after so many epochs, before their
            validation.
        checkpoint_every_n_val_epochs: Instead of `every`: after so many validation runs.
        monitor: The result that tells which checkpoint is best: a name in what
            `validation_step` or, at the end of an epoch, `training_step` returns.
        mode: Whether a low or a high result is better.
        keep_last: How many of the newest checkpoints stay; None for all of them. With 1 there
            is nothing to fall back to.
        keep_top_k: How many of the best stay besides.
        keep_every: The first checkpoint in each span of so many steps stays besides.
        resume_mode: What a run begins with: "last" with the newest checkpoint, "best" with that of
            the best result, "min" or "max" with that of the lowest or highest, a number with
            that of a step, None with nothing: what is there is moved aside. Without any
            checkpoint the run begins from scratch.
        strict_load: Refuse a checkpoint whose names, shapes or dtypes of weights differ from the
            model's; else load what matches.
        resume_data: Continue at the next batch; else begin the epoch in hand anew, as after a
            change of the data.
        save_on_signal: Save when SIGTERM or SIGINT stops the run, and on SIGUSR1.
        save_on_exception: Save when an error ends the run between two steps. In a world of one
            alone: with several ranks, some of them may be gone.
        on_save_error: "warn" to train on when a save fails; "raise" to end the run.
        verify: Compare checksums before loading; else only sizes.
        model_weights_only: Of dream-trainer 1.x; without effect, since checkpoints are complete
            and `LoadPartialCheckpointCallback` takes the weights alone.
        pin_memory: Of dream-trainer 1.x; without effect, since staging pins memory where it helps.
        enable: False for no checkpoints at all, neither saved nor resumed.

    Raises:
        ValueError: If a number is out of range, or fields contradict each other.
    """

    root_dir: str | Path | None = None
    every: Every | None = None
    checkpoint_every_n_train_epochs: int | None = None
    checkpoint_every_n_val_epochs: int | None = None
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    keep_last: int | None = 3
    keep_top_k: int = 0
    keep_every: int | None = None
    resume_mode: Literal["last", "best", "min", "max"] | int | None = "last"
    strict_load: bool = True
    resume_data: bool = True
    save_on_signal: bool = True
    save_on_exception: bool = False
    on_save_error: Literal["warn", "raise"] = "warn"
    verify: bool = True
    model_weights_only: bool = True
    pin_memory: bool = False
    enable: bool = True

    def __post_init__(self) -> None:
        for name, lowest in (
            ("checkpoint_every_n_train_epochs", 1),
            ("checkpoint_every_n_val_epochs", 1),
            ("keep_last", 1),
            ("keep_every", 1),
        ):
            value = getattr(self, name)
            if value is not None:
                _check_count(name, value, lowest)
        _check_count("keep_top_k", self.keep_top_k, 0)
        _check_choice("mode", self.mode, ("min", "max"))
        _check_choice("on_save_error", self.on_save_error, ("warn", "raise"))
        mode = self.resume_mode
        if isinstance(mode, bool) or (isinstance(mode, int) and mode < 0):
            raise ValueError(f"resume_mode={mode!r}: a step is a whole number of at least 0")
        if not isinstance(mode, int) and mode not in ("last", "best", "min", "max", None):
            raise ValueError(
                f'resume_mode={mode!r}: one of "last", "best", "min", "max", a step or None is '
                "required"
            )
        if mode == "min" and self.mode == "max":
            raise ValueError(
                'resume_mode="min" and mode="max" contradict each other; use resume_mode="best", '
                "which goes by mode"
            )
        if self.every is not None and not isinstance(self.every, Every):
            raise ValueError(
                f"every={self.every!r}: an Every is required, such as Every(steps=1000)"
            )
        cadences = ("every", "checkpoint_every_n_train_epochs", "checkpoint_every_n_val_epochs")
        given = [name for name in cadences if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} both say how often to save; give one of them "
                "(Every can combine steps, epochs and seconds)"
            )
        if not self.monitor or not isinstance(self.monitor, str):
            raise ValueError(f"monitor={self.monitor!r}: the name of a result is required")

    @property
    def cadence(self) -> Every | None:
        """How often to save; None if it goes by training or validation epochs of its own."""
        by_epochs = (self.checkpoint_every_n_train_epochs, self.checkpoint_every_n_val_epochs)
        if self.every is None and by_epochs == (None, None):
            return DEFAULT_EVERY
        return self.every

    @property
    def best_mode(self) -> Literal["min", "max"]:
        """Whether a low or a high result is better: `resume_mode="max"` says so too."""
        return "max" if self.resume_mode == "max" else self.mode

    @property
    def goes_by_monitor(self) -> bool:
        """Whether anything depends on the monitored result."""
        return self.keep_top_k > 0 or self.resume_mode in ("best", "min", "max")

    @property
    def keep_rules(self) -> KeepRules:
        """What to keep; the best one also where the next start will ask for it."""
        resumes_best = self.resume_mode in ("best", "min", "max")
        return KeepRules(
            last=self.keep_last,
            top_k=max(self.keep_top_k, 1 if resumes_best else 0),
            every=self.keep_every,
            monitor=self.monitor,
            mode=self.best_mode,
        )


def _check_count(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name}={value!r}: a whole number of at least {lowest} is required")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        shown = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name}={value!r}: {shown} is required")
