"""Validation: when it is due, and how a model is evaluated on one or several sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.trainer import optimizer_modes
from dream_trainer.trainer.divergence import refuse_divergence
from dream_trainer.trainer.evaluation_sets import (
    NO_BATCH,
    EvaluationSet,
    Round,
    rounds,
    without_padding,
)
from dream_trainer.trainer.filler import Filler
from dream_trainer.trainer.results import with_metrics
from dream_trainer.trainer.steps import in_contexts, note_place
from dream_trainer.world import torch_private
from dream_trainer.world.determinism import random_state_kept

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


Collect = Callable[[Any, Any], dict[str, Any]]
"""Takes what a step returned, and `num_samples` of its batch; returns what callbacks see."""


@dataclass(frozen=True)
class EvaluationRun:
    """What is evaluated, and how.

    Attributes:
        sets: Evaluated one after the other.
        step: The user's step, called with a batch and its index.
        step_name: Its name, for messages.
        limit: Largest number of batches of each set on a rank; None for all.
    """

    sets: Sequence[EvaluationSet]
    step: Callable[[Any, int], Any]
    step_name: str
    limit: int | None = None

    def num_batches(self, rank: int) -> int | None:
        """Batches on a rank; None if a set has no length."""
        numbers = [each.num_batches(rank, self.limit) for each in self.sets]
        return None if None in numbers else sum(n for n in numbers if n is not None)


def validation_run(trainer: BaseTrainer, limit: int | None = None) -> EvaluationRun:
    """A run over the validation sets.

    Args:
        trainer: The trainer, set up.
        limit: Largest number of batches of each set, in addition to `val_steps_per_epoch`.
    """
    limits = [n for n in (limit, trainer.training_parameters.val_steps_per_epoch) if n is not None]
    step, least = trainer.validation_step, min(limits, default=None)
    return EvaluationRun(trainer.validation_sets, step, "validation_step", least)


def sanity_validate(trainer: BaseTrainer) -> None:
    """Try validation before training, so that a mistake in it is found now.

    Of the callbacks' hooks only those of a step are called.
    """
    num_batches = trainer.training_parameters.num_sanity_val_steps
    if num_batches and trainer.counters.local_batches == 0 and trainer.validates:
        trainer.is_sanity_validating = True
        try:
            with random_state_kept(), trainer.train_batches.generators_kept():
                evaluate(trainer, validation_run(trainer, num_batches))
            trainer.reset_metrics()
        finally:
            trainer.is_sanity_validating = False


def validate_if_due(trainer: BaseTrainer) -> None:
    """Validate if a multiple of `val_every_n_steps` has been reached since the last one."""
    every, counters = trainer.training_parameters.val_every_n_steps, trainer.counters
    if every and counters.global_step // every > max(counters.validated_step, 0) // every:
        validate_if_new(trainer)


def validate_if_new(trainer: BaseTrainer, *, steps_schedulers: bool = True) -> bool:
    """Validate, unless it was done since the last step.

    Args:
        trainer: The trainer, in `fit`.
        steps_schedulers: Whether schedulers that are stepped by the result read it.

    Returns:
        False if the run was stopped before the last batch; by `validated_step` it is still due.
    """
    if not trainer.validates or trainer.counters.validated_step == trainer.counters.global_step:
        return True
    # Training goes on as if there had been no validation.
    with random_state_kept(), trainer.train_batches.generators_kept():
        trainer.callbacks.pre_validation_epoch()
        result = evaluate(trainer, validation_run(trainer))
        if result is None:
            return False
        if steps_schedulers:
            trainer.epoch_schedules.after_validation(result)
        trainer.counters.validated_step = trainer.counters.global_step
        trainer.callbacks.post_validation_epoch(result)
    trainer.exchange_requests()
    return True


def evaluate(trainer: BaseTrainer, run: EvaluationRun) -> dict[str, Any] | None:
    """Means and metrics of each set, in eval mode and without gradients.

    Returns:
        Results by name, those of a named set as `name/key`; None if it was stopped.
    """
    result: dict[str, Any] = {}
    with evaluating(trainer, run):
        for each in run.sets:
            of_set = _evaluated(trainer, run, each)
            if of_set is None:
                return None
            prefix = f"{each.name}/" if each.name else ""
            result |= {f"{prefix}{key}": value for key, value in of_set.items()}
    return result


def _evaluated(
    trainer: BaseTrainer, run: EvaluationRun, each: EvaluationSet
) -> dict[str, Any] | None:
    """Means and metrics of one set; None if it was stopped."""
    means = trainer.new_means(run.step_name)
    trainer.reset_metrics()

    def collect(result: Any, num_samples: Any) -> dict[str, Any]:
        return means.add({} if result is None else result, num_samples)

    if not evaluate_set(trainer, run, each, collect):
        return None
    reduced = means.reduce(trainer.world)
    refuse_divergence(trainer, reduced, run.step_name)
    return with_metrics(reduced, trainer.compute_metrics(), run.step_name)


@contextmanager
def evaluating(trainer: BaseTrainer, run: EvaluationRun) -> Iterator[None]:
    """Inside, models are in eval mode and a run is the trainer's current one; no gradients.

    All ranks evaluate the same model, with the running statistics of the first one.
    """
    before, trainer.evaluation_run = trainer.evaluation_run, run
    try:
        trainer.synchronize_replicas()
        optimizers = trainer.named_optimizers().values()
        with torch.no_grad(), optimizer_modes.evaluating(optimizers), _eval_mode(trainer):
            yield
        _reshard(trainer)
    finally:
        trainer.evaluation_run, trainer.validation_set = before, None


def evaluate_set(
    trainer: BaseTrainer, run: EvaluationRun, each: EvaluationSet, collect: Collect
) -> bool:
    """Run the step on the batches of a set, until the last rank has none, the limit, or a stop.

    Returns:
        False if it was stopped.
    """
    trainer.validation_set = each.name or None
    num_rounds = 0
    with without_padding(each.loader), Filler(trainer) as filler:
        for now in rounds(each, run.limit, trainer.world, trainer.loader_watch):
            if now.batch is NO_BATCH:
                _filler_step(trainer, run, now, num_rounds, filler)
            else:
                kept_by = filler if each.may_be_uneven else None
                _evaluation_step(trainer, run, now, num_rounds, collect, kept_by)
            trainer.send_requests("validate")
            num_rounds += 1
            if trainer.stop_reason is not None:
                return False
    if num_rounds == 0:
        raise RuntimeError(
            f"the {each.title} loader gave no batch; at least 1 is required: return an iterable "
            "that can be iterated repeatedly, or no validation loader"
        )
    return True


def _evaluation_step(
    trainer: BaseTrainer,
    run: EvaluationRun,
    now: Round,
    batch_idx: int,
    collect: Collect,
    filler: Filler | None,
) -> None:
    """Run one batch: move it, hooks, the user's step."""
    callbacks = trainer.callbacks
    batch = trainer.move_batch(now.batch) if trainer.moves_batches else now.batch
    with _guarded(trainer, now, "pre_validation_step"):
        batch = callbacks.pre_validation_step(batch, batch_idx)
    if filler is not None:
        filler.exchange(batch, now if batch_idx == 0 else None)
    try:
        num_samples = trainer.num_samples(batch)  # before the step, which may take it apart
        result = collect(_run_step(trainer, run, batch, batch_idx), num_samples)
    except BaseException as error:
        note_place(error, trainer, run.step_name, batch_idx)
        raise
    trainer.receive_requests()
    with _guarded(trainer, now, "post_validation_step"):
        callbacks.post_validation_step(result, batch_idx)


def _filler_step(
    trainer: BaseTrainer, run: EvaluationRun, now: Round, batch_idx: int, filler: Filler
) -> None:
    """Take part in the collectives of other ranks' steps, while this rank has no batch."""
    filler.exchange(NO_BATCH, now if batch_idx == 0 else None)
    try:
        filler.step(lambda batch: _run_step(trainer, run, batch, batch_idx))
    except BaseException as error:
        error.add_note("this rank has no batch left, and repeats one while other ranks have more")
        note_place(error, trainer, run.step_name, batch_idx)
        raise
    trainer.receive_requests()


def _run_step(trainer: BaseTrainer, run: EvaluationRun, batch: Any, batch_idx: int) -> Any:
    torch_private.mark_cudagraph_step()
    context = trainer.callbacks.validation_context
    if context is None and trainer.precision_context is None:
        return run.step(batch, batch_idx)
    return in_contexts(trainer, context, run.step, batch, batch_idx)


def _guarded(trainer: BaseTrainer, now: Round, hook: str) -> AbstractContextManager[None]:
    """Makes collectives an error in a hook that isn't called on ranks without a batch."""
    if now.is_full:
        return nullcontext()
    advice = (
        "some ranks have no batch left and would never join; collect values in the hook, and "
        "reduce them in post_validation_epoch"
    )
    return trainer.world.no_collectives(hook, advice)


def _reshard(trainer: BaseTrainer) -> None:
    """Free the parameters that FSDP gathered, so that callbacks see sharded ones as in training.

    A forward without gradients leaves those of the outermost module gathered: other tensors than
    the optimizer's. The next step would use them and ignore what callbacks wrote to the sharded
    ones.
    """
    for model in trainer.named_models().values():
        torch_private.reshard(model)


@contextmanager
def _eval_mode(trainer: BaseTrainer) -> Iterator[None]:
    """Put models in eval mode inside, and restore the mode of each module."""
    models = trainer.named_models().values()
    modes = [(m, m.training) for model in models for m in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
