"""CheckpointParameters: when to save, what to keep, what to resume."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dream_callbacks.checkpoint.retention import KeepRules
from dream_trainer.callbacks import Every
from dream_trainer.configs import CheckedFields

DEFAULT_EVERY = Every(epochs=1, seconds=1800)


@dataclass(kw_only=True)
class CheckpointParameters(CheckedFields):
    """When to save, what to keep and what to resume; independent of each other.

    A save also happens at the end of the run, before a signal ends it, and, with `keep_top_k`,
    after each validation whose result is among the best.

    Args:
        root_dir: Parent of the run directories: checkpoints are in
            `root_dir/project/group/experiment/checkpoints`. Default: the trainer's root_dir. May
            be a URL supported by fsspec, such as "s3://bucket/runs".
        every: How often to save. Default: every epoch and every 30 minutes.
        checkpoint_every_n_train_epochs: Instead of `every`: save every n epochs, before validation.
        checkpoint_every_n_val_epochs: Instead of `every`: save after every n-th validation.
        monitor: Metric that ranks checkpoints: a key of what `validation_step` or, at the end of
            an epoch, `training_step` returns, or a metric. One that the first validation lacks is
            an error; without validation, one that training lacks is a warning at its first step.
        mode: Whether a low or a high value is better.
        keep_last: Number of newest checkpoints to keep; None for all. With 1 there is no older
            checkpoint to fall back to.
        keep_top_k: Number of best checkpoints to keep in addition.
        keep_every: Also keep the first checkpoint of each interval of this many steps.
        resume_mode: Checkpoint to resume from: "last" is the newest, "best" the one with the best
            metric, "min" or "max" the one with the lowest or highest, a number the one of that
            step. None starts from scratch and moves existing checkpoints aside. Without any
            checkpoint the run starts from scratch.
        strict_load: Refuse a checkpoint whose tensor names, shapes or dtypes differ from the
            trainer's; otherwise load what matches.
        resume_data: Continue at the next batch; otherwise restart the current epoch, for example
            after a change of the data.
        save_on_signal: Save when SIGTERM or SIGINT stops the run, and on SIGUSR1.
        save_on_exception: Save when an exception ends the run between two steps. Only with one
            rank: of several ranks, some may have exited.
        on_save_error: "warn" to continue training when a save fails; "raise" to end the run.
        verify: Compare checksums before loading; otherwise only sizes.
        model_weights_only: From dream-trainer 1.x; ignored: checkpoints are always complete, and
            `LoadPartialCheckpointCallback` loads only weights.
        pin_memory: From dream-trainer 1.x; ignored: staging memory is pinned on CUDA.
        enable: False to neither save nor resume.

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
                "which uses mode"
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
        """How often to save; None with `checkpoint_every_n_…_epochs`."""
        by_epochs = (self.checkpoint_every_n_train_epochs, self.checkpoint_every_n_val_epochs)
        if self.every is None and by_epochs == (None, None):
            return DEFAULT_EVERY
        return self.every

    @property
    def best_mode(self) -> Literal["min", "max"]:
        """`mode`, or "max" with `resume_mode="max"`."""
        return "max" if self.resume_mode == "max" else self.mode

    @property
    def goes_by_monitor(self) -> bool:
        """Whether retention or resuming depends on `monitor`."""
        return self.keep_top_k > 0 or self.resume_mode in ("best", "min", "max")

    @property
    def keep_rules(self) -> KeepRules:
        """Retention rules; they keep the best checkpoint if `resume_mode` needs it."""
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
