"""The training loop: functions of a trainer, one per phase of a run.

`callbacks/callback.py` shows the same loop as pseudocode, with every hook in its place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dream_trainer.trainer import optimizer_modes
from dream_trainer.trainer.consistency import agree_on_models, agree_on_plan
from dream_trainer.trainer.divergence import refuse_divergence
from dream_trainer.trainer.results import with_metrics
from dream_trainer.trainer.state import resume_callbacks, training_state_kept
from dream_trainer.trainer.steps import in_contexts, note_place
from dream_trainer.trainer.validation import sanity_validate, validate_if_due, validate_if_new
from dream_trainer.world import signals
from dream_trainer.world.determinism import random_state, set_random_state

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

logger = logging.getLogger(__name__)


def configure(trainer: BaseTrainer) -> None:
    """Launch the world, seed, build the models."""
    callbacks = trainer.callbacks
    with failing_cleanly(trainer), trainer.random_stream.active():
        callbacks.pre_launch()
        trainer.world.connect()
        agree_on_plan(trainer)
        trainer.world.launch()
        trainer.seed_generators()
        callbacks.pre_configure()
        trainer.build_models()
        callbacks.post_configure()


def setup(trainer: BaseTrainer) -> None:
    """Prepare the models, and build optimizers, schedulers, loaders and metrics."""
    with failing_cleanly(trainer), trainer.random_stream.active():
        trainer.world.use_device()  # `configure` may have run in another thread
        trainer.callbacks.pre_setup()
        agree_on_models(trainer)
        trainer.build_training()
        trainer.build_metrics()
        trainer.finish_setup()
        trainer.callbacks.post_setup()


def fit(trainer: BaseTrainer) -> None:
    """Train until the run's limit, a stop or an error."""
    trainer.configure()
    trainer.setup()
    with signals.handled_by(trainer), failing_cleanly(trainer):
        trainer.world.use_device()
        callbacks, monitor = trainer.callbacks, trainer.world.failure_monitor()
        trainer.requests.start()
        _set_train_mode(trainer)
        resume_callbacks(trainer)
        with trainer.random_stream.active():
            callbacks.pre_fit()
            with trainer.loader_watch.watching():
                sanity_validate(trainer)
                _train_and_pause(trainer)
            trainer.synchronize_replicas()
            trainer.finish_requests()
            error = callbacks.post_fit() or trainer.end_call()
        if error is not None:
            raise error
        monitor.finish()
    signals.raise_received_signal()


@contextmanager
def failing_cleanly(trainer: BaseTrainer) -> Iterator[None]:
    """After the first error of any rank, let callbacks clean up, shut down the world, raise it."""
    monitor = trainer.world.failure_monitor()
    try:
        with monitor.watching(lambda: trainer.global_step):
            yield
    except BaseException as error:
        if trainer.exception is not None:
            raise  # a nested failing_cleanly has cleaned up
        shown = trainer.exception = monitor.report(error, trainer.global_step)
        with trainer.world.cleaning_up():
            trainer.callbacks.on_exception(shown)
            trainer.callbacks.post_fit()
            trainer.end_call()
        trainer.world.abandon()
        monitor.leave()
        if shown is error:
            raise
        raise shown  # noqa: B904  # it has its cause


def _train_and_pause(trainer: BaseTrainer) -> None:
    """Train with the random numbers that the last training stopped with, in any process."""
    if trainer.random_state_to_resume is not None:
        set_random_state(trainer.random_state_to_resume)
    try:
        _train(trainer)
    finally:
        trainer.train_batches.pause()
        trainer.random_state_to_resume = random_state()


def _train(trainer: BaseTrainer) -> None:
    counters, parameters = trainer.counters, trainer.training_parameters
    trainer.start_clock()
    if _is_done(trainer) and trainer.world.is_global_zero:
        logger.warning(
            "nothing is left to train: %d epochs and %d steps are done; raise n_epochs or "
            "max_steps to continue",
            counters.current_epoch + (counters.epoch_stage == "end"),
            counters.global_step,
        )
    validate_if_due(trainer)  # a checkpoint of this step may precede its validation
    while not _is_done(trainer) and not _is_stopped_between_epochs(trainer):
        if counters.epoch_stage == "end":
            counters.current_epoch += 1
            counters.epoch_batches = 0
            counters.epoch_stage = "train"
        _run_epoch(trainer)
    ended_inside_epoch = counters.epoch_stage == "train" and counters.epoch_batches > 0
    if ended_inside_epoch and trainer.stop_reason is None and parameters.val_every_n_steps is None:
        with training_state_kept(trainer):  # a run that continues from here doesn't validate here
            validate_if_new(trainer, steps_schedulers=False)
    trainer.epoch_schedules.warn_of_unstepped()


def _is_stopped_between_epochs(trainer: BaseTrainer) -> bool:
    """Whether the run stops before the next epoch. Collective, blocking."""
    trainer.exchange_requests()
    return trainer.stop_reason is not None


def _is_done(trainer: BaseTrainer) -> bool:
    counters, parameters = trainer.counters, trainer.training_parameters
    epochs_done = counters.current_epoch + (counters.epoch_stage == "end")
    return (
        epochs_done >= parameters.epoch_limit or counters.global_step >= parameters.step_limit
    ) and counters.epoch_stage != "validate"


def _run_epoch(trainer: BaseTrainer) -> None:
    """Train and validate one epoch, or the rest of it."""
    callbacks, counters = trainer.callbacks, trainer.counters
    callbacks.pre_epoch()
    if counters.epoch_stage == "train":
        if not _train_epoch(trainer):
            return
        result = trainer.epoch_means.reduce(trainer.world)
        refuse_divergence(trainer, result, "training_step")
        result = with_metrics(result, trainer.compute_train_metrics(), "training_step")
        trainer.epoch_means = trainer.new_means("training_step")
        trainer.epoch_schedules.after_training(result)
        counters.epoch_stage = "validate"
        callbacks.post_train_epoch(result)
    validates = trainer.training_parameters.val_every_n_steps is None
    if validates and not validate_if_new(trainer):
        return
    trainer.epoch_schedules.end_epoch(is_validated=validates and trainer.validates)
    counters.epoch_stage = "end"
    callbacks.post_epoch()


def _train_epoch(trainer: BaseTrainer) -> bool:
    """Train to the end of the epoch.

    Returns:
        False if training ended earlier.
    """
    counters, batches, optimization = (
        trainer.counters,
        trainer.train_batches,
        trainer.optimization,
    )
    accumulation = trainer.training_parameters.gradient_accumulation_steps
    step_limit = trainer.training_parameters.step_limit
    num_batches = trainer.num_train_batches
    assert num_batches is not None, "the loaders are built in setup"
    if counters.epoch_batches == 0:
        trainer.reset_train_metrics()
        trainer.epoch_schedules.begin_epoch()
    trainer.callbacks.pre_train_epoch()
    if counters.epoch_batches == 0:
        batches.start_epoch(counters.current_epoch)
        steps_before = counters.global_step
    else:
        steps_before = -1
        batches.resume_epoch(counters.current_epoch, counters.epoch_batches)
    while counters.epoch_batches < num_batches:
        group_size = min(accumulation, num_batches - counters.epoch_batches)
        for index_in_group in range(group_size):
            optimization.begin_batch(index_in_group, group_size)
            train_step(trainer, batches.next_batch())
        _finish_step(trainer)
        if trainer.stop_reason is not None:
            return False
        if counters.global_step >= step_limit and counters.epoch_batches < num_batches:
            return False
    batches.finish_epoch()
    is_warm = counters.local_batches > trainer.training_parameters.warm_up_batches
    if is_warm and counters.global_step == steps_before:
        raise _no_step(num_batches)
    return True


def train_step(trainer: BaseTrainer, batch: Any) -> None:
    """Run one batch: move it, hooks, the user's step, counters."""
    callbacks, counters, optimization = trainer.callbacks, trainer.counters, trainer.optimization
    batch_idx = counters.epoch_batches
    if trainer.moves_batches:
        batch = trainer.move_batch(batch)
    batch = callbacks.pre_train_step(batch, batch_idx)
    try:
        num_samples = trainer.num_samples(batch)  # before the step, which may take it apart
        if callbacks.train_context is None and trainer.precision_context is None:
            result = trainer.training_step(batch, batch_idx)
        else:
            result = in_contexts(
                trainer, callbacks.train_context, trainer.training_step, batch, batch_idx
            )
        result = trainer.epoch_means.add(result, num_samples)
    except BaseException as error:
        note_place(error, trainer, "training_step", batch_idx)
        raise
    counters.epoch_batches = batch_idx + 1
    counters.local_batches += 1
    if not optimization.is_accumulating:
        if optimization.num_steps:
            counters.global_step += optimization.num_steps
        else:
            optimization.end_group()
        trainer.receive_requests()
    callbacks.post_train_step(result, batch_idx)


def _finish_step(trainer: BaseTrainer) -> None:
    """After the batches of an optimizer step: send requests, validate if due."""
    trainer.send_requests("train")
    if not trainer.first_step_done:
        _look_for_first_step(trainer)
    if trainer.training_parameters.val_every_n_steps is not None and trainer.stop_reason is None:
        validate_if_due(trainer)


_LONGEST_ACCUMULATION = 1000
"""Batches after which a run that only accumulates gradients is taken to have forgotten the step."""


def _look_for_first_step(trainer: BaseTrainer) -> None:
    """Warn or raise if `training_step` seems never to step."""
    counters, optimization = trainer.counters, trainer.optimization
    if counters.global_step:
        trainer.first_step_done = True
        trainer.world.tighten_timeouts()
        trainer.synchronize_replicas()
        optimization.warn_of_ownerless(after_step=True)
        return
    num_batches = counters.local_batches
    num_late = num_batches - trainer.training_parameters.warm_up_batches
    if num_late <= 0 or optimization.has_skipped:
        return
    if num_late > _LONGEST_ACCUMULATION or not optimization.has_gradients():
        raise _no_step(num_batches)
    if not trainer.warned_of_no_step and trainer.world.is_global_zero:
        trainer.warned_of_no_step = True
        logger.warning(
            "batch %d ended without self.step(optimizer): gradients accumulate until it is called",
            num_batches,
        )


def _no_step(num_batches: int) -> RuntimeError:
    return RuntimeError(
        f"no optimizer step after batch {num_batches}; in training_step, call "
        "self.backward(loss) and self.step(optimizer), or self.step(optimizer, closure): an "
        "optimizer.step() of your own isn't seen. If the first batches only collect data, set "
        "TrainingParameters(warm_up_batches=…)"
    )


def _set_train_mode(trainer: BaseTrainer) -> None:
    """Put all optimizers and their models into train mode."""
    optimizer_modes.train(trainer.named_optimizers().values())
    for optimizer in trainer.named_optimizers().values():
        model = trainer.model_of(optimizer)
        if not model.training:
            model.train()
