"""Calls of the user's steps inside callbacks' contexts, and notes on their errors."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dream_trainer.trainer.fsdp_methods import explain_sharded_call

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def in_contexts(
    trainer: BaseTrainer, callback_context: Any, step: Any, batch: Any, batch_idx: int
) -> Any:
    """Call a step inside the contexts of callbacks and of the precision; returns its result.

    Raises:
        RuntimeError: If a callback's context suppressed the step's error.
    """
    with ExitStack() as stack:
        if callback_context is not None:
            stack.enter_context(callback_context())
        if trainer.precision_context is not None:
            stack.enter_context(trainer.precision_context())
        return step(batch, batch_idx)


def note_place(error: BaseException, trainer: BaseTrainer, step: str, batch_idx: int) -> None:
    """Add notes to an error: the step, rank, global step, epoch and batch; what to do."""
    if trainer.world.shape.uses_fsdp:
        explain_sharded_call(error)
    error.add_note(
        f"raised in {step} on rank {trainer.world.rank} at step {trainer.global_step} "
        f"(epoch {trainer.current_epoch}, batch {batch_idx})"
    )
