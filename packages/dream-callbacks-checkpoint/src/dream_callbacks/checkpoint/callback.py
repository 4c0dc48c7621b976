"""CheckpointCallback: when to save and which checkpoint to resume from."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from dream_callbacks.checkpoint.config import CheckpointParameters
from dream_callbacks.checkpoint.errors import CheckpointError, failed_save_text
from dream_callbacks.checkpoint.io.filesystem import below
from dream_callbacks.checkpoint.manager import CheckpointManager, PendingSave
from dream_callbacks.checkpoint.restore import load_into
from dream_callbacks.checkpoint.retention import Choice, is_among_best
from dream_callbacks.checkpoint.weights import find_directory, load_weights_at
from dream_trainer.callbacks import Cadence, Callback, Every
from dream_trainer.numbers import as_float, is_number
from dream_trainer.trainer import BaseTrainer, Counters
from dream_trainer.trainer.mixins import EvalMetricMixin
from dream_trainer.world import RUN_SIGNALS, Request

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """State of the callback during a run."""

    manager: CheckpointManager
    save: Request
    time_is_up: Request
    save_failed: Request
    cadence: Cadence | None = None
    clock: Cadence | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    metrics_step: int = -1
    step_keys: tuple[str, ...] = ()
    due_at_epoch_end: str | None = None
    is_between_steps: bool = False
    knows_monitor: bool = False
    has_warned_of_monitor: bool = False
    starts_afresh: bool = False


class CheckpointCallback(Callback[BaseTrainer]):
    """Saves the full state of a run and resumes from it when the run is started again.

    Saves between optimizer steps: at the cadence in `parameters`, at the end of the run (also when
    SIGTERM or SIGINT stops it) and on request (`trainer.request_save`, SIGUSR1). A step is reported
    as saved once its checkpoint is durable; older checkpoints are deleted only after that. Restores
    in `post_setup`. Raises ReplicaMismatch if ranks have different copies of a parameter.

    Runs after all other callbacks, except those that are placed after it, so that it saves their
    final state of the step. Saving and restoring are collective. Steps without a save cost no host
    sync and no communication.

    Args:
        parameters: When to save, what to keep, what to resume.
    """

    after: ClassVar = {Callback}

    _run: RunState | None = None
    _saved_step = -1
    """Step of the newest checkpoint that this run saved or resumed from; -1 if there is none."""

    def __init__(self, parameters: CheckpointParameters | None = None) -> None:
        self.parameters = CheckpointParameters() if parameters is None else parameters

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        return {k: v for k, v in state.items() if k not in ("_run", "_saved_step")}

    @property
    def directory(self) -> str | Path:
        """Checkpoint directory, or its URL as text. Needs an attached callback."""
        trainer = self.trainer
        root = self.parameters.root_dir
        if root is None:
            return trainer.run_dir / "checkpoints"
        return below(root, trainer.project, trainer.group, trainer.experiment, "checkpoints")

    # Begin and end of a run

    def post_setup(self) -> None:
        if not self.parameters.enable:
            return
        run = self._run = self._new_run()
        running = self.trainer.running
        if running == "fit" or (running is None and not run.manager.is_in_use()):
            run.manager.open()
            try:
                self._restore(run)
            finally:
                run.manager.close()  # other processes may use it until `fit`
            return
        run.manager.look()  # another run may be training
        run.starts_afresh = self.parameters.resume_mode is None
        with contextlib.ExitStack() as held:
            if not run.starts_afresh:
                self._restore(run, held)

    def pre_fit(self) -> None:
        if not self.parameters.enable:
            return
        run = self._run = self._run or self._new_run()
        run.manager.open()
        if run.starts_afresh:
            run.manager.start_afresh()
            run.starts_afresh = False
        self._start_counting(run)
        run.is_between_steps = True

    def post_fit(self) -> None:
        run = self._run
        if run is None:
            return
        reason = self.trainer.stop_reason or "end"
        try:
            if self.trainer.exception is None:
                self._save_if_asked(reason)
                self._settle(run)
        finally:
            self._close()

    def on_exception(self, exception: BaseException) -> None:
        run = self._run
        if run is None:
            return
        is_alone = not self.trainer.world.is_distributed
        trains = self.trainer.running in ("fit", None)
        if (
            trains
            and self.parameters.save_on_exception
            and not isinstance(exception, CheckpointError)
        ):
            if is_alone and run.is_between_steps:
                self._save(type(exception).__name__)
            else:
                logger.warning(
                    "save_on_exception: nothing was saved, since the error came %s; the newest "
                    "checkpoint is that of step %d",
                    "inside a step" if is_alone else "where other ranks may be gone",
                    self._saved_step,
                )
        self._close()

    # Evaluation

    def load_for_evaluation(self, checkpoint: str | int | Path) -> Counters:
        """Load the weights of a checkpoint into the models: `trainer.validate(checkpoint=…)`.

        Needs no lock: another run may be training in the directory. Collective.

        Args:
            checkpoint: "last", "best", "min", "max" or a step of this run; or a path, as for
                LoadPartialCheckpointCallback, whose newest checkpoint is used.

        Raises:
            CheckpointError: On all ranks, if there is none, it is damaged, or its weights aren't
                those of the trainer's models.
        """
        parameters, root, which = self.parameters, self.directory, checkpoint
        if not (isinstance(which, int) or which in ("last", "best", "min", "max")):
            root, step = find_directory(self.trainer, which)
            which = "last" if step is None else step
        choice = Choice(
            which,  # type: ignore[arg-type]  # one of these
            parameters.monitor,
            parameters.best_mode,
            "checkpoint",
        )
        counters, report = load_weights_at(self.trainer, root, choice, verify=parameters.verify)
        if report.missing or report.unused or report.mismatched:
            raise CheckpointError(
                f"the weights of {report.checkpoint} aren't those of the trainer's models; "
                f"evaluate it with the models that it was saved with.\n{report}"
            )
        return counters

    # When to save

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self._run is not None:
            self._run.is_between_steps = False

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        run = self._run
        if run is None or self.trainer.is_accumulating_gradients:
            return
        run.is_between_steps = True
        if not run.knows_monitor:
            if not run.step_keys and not self._has_train_metrics:
                self._warn_if_monitor_cannot_come(run, result)
            run.step_keys = tuple(result)
        self._ask(run)
        if run.save_failed.take():
            self._settle(run)
        is_asked, is_time = run.save.take(), run.time_is_up.take()
        if run.cadence is not None and run.cadence.due(self.trainer.global_step):
            self._save(f"every {run.cadence.every.steps} steps")
        elif is_time:
            self._save("time")
        elif is_asked:
            self._save_if_asked(run.save.reason())

    def _ask(self, run: RunState) -> None:
        """Request what only this rank knows; clocks and background threads differ by rank."""
        if run.clock is not None and self.trainer.world.is_global_zero:
            if run.clock.due(self.trainer.global_step):
                run.time_is_up.ask()
        if self._has_failed():
            run.save_failed.ask()

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        run = self._run
        if run is None:
            return
        self._note_metrics(run, result)
        self._warn_if_monitor_cannot_come(run, result)
        every = self.parameters.checkpoint_every_n_train_epochs
        if every is not None and (self.trainer.current_epoch + 1) % every == 0:
            self._save("train epoch")

    def pre_validation_epoch(self) -> None:
        if self._run is not None:
            self._run.is_between_steps = False

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        run, counters = self._run, self.trainer.counters
        if run is None or self.trainer.running != "fit":
            return
        run.is_between_steps = True
        self._check_monitor(run, result)
        self._note_metrics(run, result)
        reason = self._reason_after_validation(run)
        if reason is None:
            return
        if counters.epoch_stage == "validate":
            run.due_at_epoch_end = reason  # saved in post_epoch, when the epoch is complete
        elif self.trainer.training_parameters.val_every_n_steps is not None:
            self._save(reason)
        # Otherwise the run ends here and post_fit saves, without a trace of this validation.

    def post_epoch(self) -> None:
        run = self._run
        if run is None:
            return
        reason, run.due_at_epoch_end = run.due_at_epoch_end, None
        cadence = run.cadence
        epochs_done = self.trainer.current_epoch + 1
        if cadence is not None and cadence.due(self.trainer.global_step, epochs_done):
            reason = "epoch"
        if reason is not None:
            self._save(reason)

    # Saving

    def _save_if_asked(self, reason: str) -> None:
        """Save, unless a signal requested it and `save_on_signal` is off."""
        if self.parameters.save_on_signal or reason not in RUN_SIGNALS:
            self._save(reason)

    def _save(self, reason: str) -> None:
        """Save this step, unless it is already saved."""
        run, trainer = self._run, self.trainer
        assert run is not None
        self._settle(run)
        step = trainer.global_step
        if step in (0, self._saved_step):
            return
        self._start_clock(run)
        run.time_is_up.withdraw()
        trainer.synchronize_replicas()  # one copy is saved: an error if they differ
        try:
            self._write(run, reason)
        except CheckpointError as error:
            self._report(self._failure_text(step, error), error)
        else:
            self._saved_step = step

    def _write(self, run: RunState, reason: str) -> None:
        """Save and commit synchronously."""
        began_s = time.monotonic()
        save = self._prepare(run, reason)
        run.manager.write(save)
        if self.trainer.world.is_global_zero:
            run.manager.finish(save, {}, time.monotonic() - began_s)

    def _prepare(self, run: RunState, reason: str) -> PendingSave:
        trainer = self.trainer
        step = trainer.global_step
        return run.manager.prepare(
            trainer.state_dict,
            step=step,
            epoch=trainer.current_epoch,
            reason=reason,
            num_train_batches=trainer.num_train_batches,
            metrics=dict(run.metrics) if run.metrics_step == step else {},
        )

    def _report(self, text: str, error: BaseException | None = None) -> None:
        """Raise or warn about a failed save, as `on_save_error` says. Called on all ranks."""
        if self.parameters.on_save_error == "raise":
            raise CheckpointError(text) from error
        if self.trainer.world.is_global_zero:
            logger.warning("%s; training continues, and the next save is as planned", text)

    def _failure_text(self, step: int, error: BaseException) -> str:
        """Message about a failed save. Not collective."""
        return failed_save_text(error, step, self.directory, self._saved_step)

    # Hooks for background saves

    def _has_failed(self) -> bool:
        """Whether a background save has failed on this rank."""
        return False

    def _settle(self, run: RunState) -> None:
        """Wait for a background save and report its failure. Called on all ranks."""

    # Metrics

    def _note_metrics(self, run: RunState, result: Mapping[str, Any]) -> None:
        """Keep the scalars of a result; add them to this step's checkpoint if it is saved."""
        step = self.trainer.global_step
        if run.metrics_step != step:
            run.metrics, run.metrics_step = {}, step
        run.metrics |= _scalars(result)
        if self._saved_step == step:
            self._add_late_metrics(run, step)

    def _add_late_metrics(self, run: RunState, step: int) -> None:
        if self.trainer.world.is_global_zero:
            run.manager.add_metrics(step, run.metrics)

    def _reason_after_validation(self, run: RunState) -> str | None:
        trainer, parameters = self.trainer, self.parameters
        every = parameters.checkpoint_every_n_val_epochs
        if every is not None:
            steps = trainer.training_parameters.val_every_n_steps
            num_done = trainer.global_step // steps if steps else trainer.current_epoch + 1
            if num_done % every == 0:
                return "validation"
        if not parameters.keep_rules.top_k:
            return None
        value = run.metrics.get(parameters.monitor)
        manager = run.manager
        is_best = manager.ranks.on_rank_zero(
            lambda: (
                value is not None
                and is_among_best(value, manager.checkpoints, parameters.keep_rules)
            )
        )
        return f"{parameters.monitor} among the best" if is_best else None

    def _check_monitor(self, run: RunState, result: Mapping[str, Any]) -> None:
        """Raise as soon as it is known that no result contains `monitor`."""
        if run.knows_monitor or not self.parameters.goes_by_monitor:
            return
        monitor = self.parameters.monitor
        known = sorted({*_scalars(result), *run.step_keys})
        if monitor in known:
            run.knows_monitor = True
        elif run.step_keys:
            raise CheckpointError(
                f"monitor={monitor!r} is in no result; there are {', '.join(known) or 'none'}: set "
                "monitor to one of these, or report it from validation_step"
            )

    def _warn_if_monitor_cannot_come(self, run: RunState, result: Mapping[str, Any]) -> None:
        """Warn once if nothing validates and training doesn't report `monitor` either."""
        trainer, parameters = self.trainer, self.parameters
        validates = trainer.validates and trainer.training_parameters.val_every_n_steps != 0
        if validates or not parameters.goes_by_monitor or run.has_warned_of_monitor:
            return
        if is_number(result.get(parameters.monitor)):
            run.knows_monitor = True
            return
        run.has_warned_of_monitor = True
        if trainer.world.is_global_zero:
            logger.warning(
                "monitor=%r: there is no validation, and training_step reports %s, so no "
                "checkpoint can be the best: return a validation loader from "
                "configure_dataloaders, or set monitor to what training_step reports",
                parameters.monitor,
                ", ".join(result) or "nothing",
            )

    @property
    def _has_train_metrics(self) -> bool:
        """Whether an epoch's result may have more keys than a step's."""
        trainer = self.trainer
        return isinstance(trainer, EvalMetricMixin) and bool(trainer.named_train_metrics())

    # Begin and end

    def _new_run(self) -> RunState:
        trainer = self.trainer
        for name, other in trainer.callbacks.items():
            if isinstance(other, CheckpointCallback) and other is not self:
                if other.parameters.enable and other.directory == self.directory:
                    raise CheckpointError(
                        f"callback {name} writes to {self.directory} too; give one of the two "
                        "another root_dir, or leave it out"
                    )
        requests = trainer.requests
        name = next(name for name, each in trainer.callbacks.items() if each is self)
        return RunState(
            CheckpointManager(self.directory, trainer.world, self.parameters.keep_rules),
            save=requests.register("save"),
            time_is_up=requests.register(f"{name}: time"),
            save_failed=requests.register(f"{name}: failed save"),
        )

    def _close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.manager.close()

    def _restore(self, run: RunState, held: contextlib.ExitStack | None = None) -> None:
        manager, parameters = run.manager, self.parameters
        if parameters.resume_mode is None:
            manager.start_afresh()
            return
        choice = Choice(parameters.resume_mode, parameters.monitor, parameters.best_mode)
        checkpoint = manager.choose(choice, verify=parameters.verify, held=held)
        if checkpoint is None:
            return
        load_into(
            self.trainer,
            manager.filesystem,
            checkpoint,
            manager.ranks,
            strict=parameters.strict_load,
            resume_data=parameters.resume_data,
        )
        self._saved_step = checkpoint.step
        if self.trainer.world.is_global_zero:
            logger.info("continuing from %s/%s", manager.filesystem, checkpoint.name)

    def _start_counting(self, run: RunState) -> None:
        every, counters = self.parameters.cadence, self.trainer.counters
        if every is not None and (every.steps is not None or every.epochs is not None):
            epochs_done = counters.current_epoch + (counters.epoch_stage == "end")
            by_count = Every(steps=every.steps, epochs=every.epochs)
            run.cadence = by_count.start(counters.global_step, epochs_done)
        self._start_clock(run)

    def _start_clock(self, run: RunState) -> None:
        every = self.parameters.cadence
        if every is not None and every.seconds is not None:
            run.clock = Every(seconds=every.seconds).start()


def _scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of a result as floats. Host sync for tensors on a device."""
    numbers = {name: as_float(value) for name, value in result.items()}
    return {name: number for name, number in numbers.items() if number is not None}
