"""Validation: when it is due, and its run over the loader in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.trainer.batches import batches_together
from dream_trainer.trainer.divergence import refuse_divergence
from dream_trainer.trainer.results import EpochMeans, with_metrics
from dream_trainer.trainer.steps import in_contexts, note_place
from dream_trainer.world import torch_private
from dream_trainer.world.determinism import random_state, random_state_kept, set_random_state

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def sanity_validate(trainer: BaseTrainer) -> None:
    """Try validation before training, so that a mistake in it is found now."""
    num_batches = trainer.training_parameters.num_sanity_val_steps
    if num_batches and trainer.counters.local_batches == 0 and trainer.validates:
        with random_state_kept():
            _validate(trainer, max_batches=num_batches)


def validate_if_due(trainer: BaseTrainer) -> None:
    """Validate if `val_every_n_steps` is set and due."""
    every, global_step = trainer.training_parameters.val_every_n_steps, trainer.counters.global_step
    if every and global_step and global_step % every == 0:
        validate_if_new(trainer)


def validate_if_new(trainer: BaseTrainer) -> bool:
    """Validate, unless it was done since the last step.

    Returns:
        False if the run was stopped before the last batch; by `validated_step` it is still due.
    """
    if trainer.validates and trainer.counters.validated_step != trainer.counters.global_step:
        return _validate(trainer, max_batches=None)
    return True


def _validate(trainer: BaseTrainer, max_batches: int | None) -> bool:
    """Run validation over the loader, or over `max_batches` of it.

    If the run is stopped, returns after the current batch and restores the random state, so that a
    resumed run repeats the validation exactly.

    Returns:
        Whether it was completed.
    """
    callbacks = trainer.callbacks
    random_state_before = random_state()
    callbacks.pre_validation_epoch()
    trainer.reset_metrics()
    means = trainer.new_means("validation_step")
    with torch.no_grad(), _eval_mode(trainer):
        num_batches = _evaluate(trainer, max_batches, means)
    _reshard(trainer)
    if trainer.stop_reason is not None:
        set_random_state(random_state_before)
        return False
    if num_batches == 0:
        raise RuntimeError(
            "the validation loader gave no batch; at least 1 is required: return an iterable "
            "that can be iterated repeatedly, or no validation loader"
        )
    result = means.reduce(trainer.world)
    refuse_divergence(trainer, result, "validation_step")
    result = with_metrics(result, trainer.compute_metrics(), "validation_step")
    if max_batches is None:
        trainer.counters.validated_step = trainer.counters.global_step
    callbacks.post_validation_epoch(result)
    trainer.exchange_requests()
    return True


def _evaluate(trainer: BaseTrainer, max_batches: int | None, means: EpochMeans) -> int:
    """Evaluate batches of the validation loader until its end, the limit or a stop.

    Returns:
        Number of batches.
    """
    limits = [n for n in (max_batches, trainer.num_val_batches) if n is not None]
    loader, limit = trainer.val_dataloader or (), min(limits, default=None)
    batch_idx = 0
    for batch in batches_together(loader, limit, trainer.world, "validation", trainer.loader_watch):
        _validation_step(trainer, batch, batch_idx, means)
        batch_idx += 1
        if trainer.stop_reason is not None:
            break
    return batch_idx


def _validation_step(trainer: BaseTrainer, batch: Any, batch_idx: int, means: EpochMeans) -> None:
    callbacks = trainer.callbacks
    if trainer.moves_batches:
        batch = trainer.move_batch(batch)
    batch = callbacks.pre_validation_step(batch, batch_idx)
    torch_private.mark_cudagraph_step()
    try:
        num_samples = trainer.num_samples(batch)  # before the step, which may take it apart
        if callbacks.validation_context is None and trainer.precision_context is None:
            result = trainer.validation_step(batch, batch_idx)
        else:
            result = in_contexts(
                trainer, callbacks.validation_context, trainer.validation_step, batch, batch_idx
            )
        result = means.add({} if result is None else result, num_samples)
    except BaseException as error:
        note_place(error, trainer, "validation_step", batch_idx)
        raise
    trainer.receive_requests()
    callbacks.post_validation_step(result, batch_idx)
    trainer.send_requests("validate")


def _reshard(trainer: BaseTrainer) -> None:
    """Free the parameters that FSDP gathered, so that callbacks see sharded ones as in training.

    A forward without gradients leaves those of the outermost module gathered: other tensors than
    the optimizer's. The next step would use them and ignore what callbacks wrote to the sharded
    ones.
    """
    if trainer.world.shape.uses_fsdp:
        from torch.distributed.fsdp import FSDPModule

        for model in trainer.named_models().values():
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


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
