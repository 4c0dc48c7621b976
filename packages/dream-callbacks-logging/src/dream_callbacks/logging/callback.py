"""LoggerCallback: opens the sinks and logs the scalars of training and validation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from dream_callbacks.logging.batch_cadence import BatchCadence, check_cadence
from dream_callbacks.logging.log_keys import evaluation_group, prefixed_key, set_prefix
from dream_callbacks.logging.open_sinks import (
    AnySink,
    OpenSinks,
    checked_sinks,
    logged_run,
    planned_sinks,
)
from dream_callbacks.logging.scalars import (
    RankMeans,
    Scalars,
    means_of_rank,
    select_scalars,
    to_floats,
)
from dream_callbacks.logging.sinks.base import DeferredSink
from dream_callbacks.logging.step_rate import StepRate, Stopwatch
from dream_callbacks.logging.to_jsonable import to_jsonable
from dream_trainer.callbacks import Callback
from dream_trainer.trainer.mixins import LoggerMixin

_AUTO_EVERY = 50


class LoggerCallback(Callback[LoggerMixin]):
    """Logs the scalars that the steps return, over `global_step`.

    - `train/<key>`, `epoch` and `steps_per_s`, for the optimizer step that contains the n-th
      batch: means over the microbatches of that step and over the ranks that report the key, which
      equals the value of one batch of the full size. A `WeightedMean` counts with its weight, any
      other value with 1.
    - `epoch/<key>` and `epoch/seconds` after each epoch: means over its samples.
    - `val/<key>` after each validation run. A key that already starts with "val", such as
      "val_loss", is not prefixed.
    - `val_batch/<key>` and `val_batch/index` for single validation batches, if enabled, once the
      validation run is complete. Ranks may have different numbers of batches.
    - `val/<key>` after `trainer.validate()` and `test/<key>` after `trainer.test()`. Without a
      `fit` of this trainer before, another run may be logging to the run directory, so they are
      logged to the folder `evaluation` in it.

    A step that logs costs an all-reduce of one vector and one copy to the host, which waits for the
    device; other steps read nothing. The sinks are opened in `pre_fit`, or before an evaluation,
    and closed after it, on global rank 0: put this callback before callbacks that log in these
    hooks.

    Args:
        log_every_n_train_batches: "auto" logs the first batch of the run and every 50th. None
            disables logging of training batches.
        log_every_n_val_batches: None disables logging of validation batches.
        code_dir: Also log the source files below this directory.
        sinks: Sinks to log to. Sinks that are already open are not closed. Default: JSON lines in
            the run directory, and Weights & Biases if the config or the trainer enables it. JSON
            lines are always added if every other sink could lose values in a crash.
        reduce: "mean" over ranks, or None for the values of rank 0.

    Raises:
        ValueError: If a number is below 1, or `reduce` is unknown.
        TypeError: If an item of `sinks` isn't a sink.
    """

    def __init__(
        self,
        log_every_n_train_batches: int | Literal["auto"] | None = "auto",
        log_every_n_val_batches: int | None = None,
        code_dir: str | os.PathLike[str] | None = None,
        sinks: Sequence[AnySink] | None = None,
        reduce: Literal["mean"] | None = "mean",
    ) -> None:
        if reduce not in ("mean", None):
            raise ValueError(f'reduce={reduce!r}: "mean" or None is required')
        if log_every_n_train_batches != "auto":
            check_cadence("log_every_n_train_batches", log_every_n_train_batches)
        check_cadence("log_every_n_val_batches", log_every_n_val_batches)
        self.log_every_n_train_batches = log_every_n_train_batches
        self.log_every_n_val_batches = log_every_n_val_batches
        self.code_dir = None if code_dir is None else Path(code_dir)
        self.sinks = None if sinks is None else checked_sinks(sinks)
        self.reduce = reduce
        self._open_sinks: OpenSinks | None = None
        self._has_fitted = False
        self._begin(0, 0)

    def _begin(self, step: int, num_batches: int) -> None:
        """Reset to the state before the first batch of a session."""
        self._cadence = self.cadence(num_batches)
        self._earlier: list[Scalars] = []
        self._watch = Stopwatch()
        self._rate = StepRate(step, self._watch)
        self._epoch_began_s = 0.0
        self._was_training = False
        self._num_val_batches = 0
        self._val_batches: dict[tuple[str, int], tuple[int, Scalars]] = {}
        self._train_means = RankMeans()
        self._val_means = RankMeans()

    def cadence(self, num_batches: int) -> BatchCadence | None:
        """Tells at which steps training batches are logged; None if at none.

        Args:
            num_batches: Batches of this rank so far.
        """
        every = self.log_every_n_train_batches
        if every == "auto":
            return BatchCadence(_AUTO_EVERY, num_batches, with_first=True)
        return None if every is None else BatchCadence(every, num_batches)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_open_sinks": None, "_has_fitted": False}

    # Sinks

    def pre_launch(self) -> None:
        for sink in planned_sinks(self.sinks, self.trainer):
            if isinstance(sink, DeferredSink):
                sink.check()

    def pre_fit(self) -> None:
        trainer = self.trainer
        self._begin(trainer.global_step, trainer.local_batches)
        self._has_fitted = True
        self._open_sinks = OpenSinks.open(self.sinks, trainer)
        if trainer.sinks:
            trainer.log_config(to_jsonable(trainer.config))
            if self.code_dir is not None:
                trainer.log_code(self.code_dir)

    def post_fit(self) -> None:
        self._close()

    def _close(self) -> None:
        if self._open_sinks is not None:
            self._open_sinks.close()
            self._open_sinks = None

    def _open_for_evaluation(self) -> None:
        run = dataclasses.replace(logged_run(self.trainer), is_evaluation=True)
        if not self._has_fitted:
            run = dataclasses.replace(run, run_dir=run.run_dir / "evaluation")
        self._open_sinks = OpenSinks.open(self.sinks, self.trainer, run)
        self.trainer.at_end(self._close)

    # Training

    def pre_train_epoch(self) -> None:
        self._watch.run()
        self._epoch_began_s = self._watch.seconds

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self._cadence is None:
            return
        trainer = self.trainer
        if trainer.is_accumulating_gradients:
            self._earlier.append(select_scalars(result))
            return
        if self._cadence.due(trainer.local_batches):
            means = self._read([*self._earlier, select_scalars(result)], self._train_means)
            if trainer.sinks:
                values = {prefixed_key("train", key): value for key, value in means.items()}
                values["epoch"] = trainer.current_epoch + (batch_idx + 1) / (
                    trainer.num_train_batches or 1
                )
                values["steps_per_s"] = self._rate.read(trainer.global_step)
                trainer.log_dict(values)
        if self._earlier:
            self._earlier = []

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self._watch.pause()
        if self.trainer.sinks:
            values = {f"epoch/{key}": value for key, value in self._numbers(result).items()}
            values["epoch/seconds"] = self._watch.seconds - self._epoch_began_s
            self.trainer.log_dict(values)

    # Validation

    def pre_validation_epoch(self) -> None:
        self._was_training = self._watch.is_running
        self._watch.pause()
        self._val_batches.clear()
        if self.trainer.running in ("validate", "test"):
            self._open_for_evaluation()

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        every, trainer = self.log_every_n_val_batches, self.trainer
        if every is None or trainer.is_sanity_validating or trainer.running == "predict":
            return
        self._num_val_batches += 1
        if (batch_idx + 1) % every == 0:
            place = set_prefix(trainer), batch_idx
            self._val_batches[place] = self._num_val_batches, select_scalars(result)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        if self._was_training:
            self._watch.run()
        if self.log_every_n_val_batches is not None:
            self._log_val_batches()
        if self.trainer.sinks:
            group, values = evaluation_group(self.trainer), self._numbers(result)
            if values:
                self.trainer.log_dict({prefixed_key(group, k): v for k, v in values.items()})

    def _log_val_batches(self) -> None:
        """Log the validation batches, each averaged over the ranks that had one. Collective."""
        mine = {place: index for place, (index, _) in self._val_batches.items()}
        of_ranks = self.trainer.world.all_gather(mine) if self.reduce == "mean" else [mine]
        for place, index in {p: i for indices in of_ranks for p, i in indices.items()}.items():
            _, scalars = self._val_batches.get(place, (index, Scalars({}, {})))
            means = self._read([scalars], self._val_means)
            if self.trainer.sinks:
                values = {f"val_batch/{place[0]}{key}": value for key, value in means.items()}
                self.trainer.log_dict({**values, "val_batch/index": index})

    # Reading

    def _read(self, batches: list[Scalars], means: RankMeans) -> dict[str, float]:
        """The scalars, averaged over the ranks and the batches. Collective."""
        world = self.trainer.world
        if self.reduce == "mean":
            return means.read(batches, world)
        return means_of_rank(batches, world.device) if world.is_global_zero else {}

    def _numbers(self, result: dict[str, Any]) -> dict[str, float]:
        """The scalars of an epoch's result, which is already reduced."""
        return to_floats(select_scalars(result).values, self.trainer.world.device)
