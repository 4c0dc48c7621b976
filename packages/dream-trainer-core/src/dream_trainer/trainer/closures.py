"""Closures of optimizers that evaluate the loss themselves, such as LBFGS and SAM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dream_trainer.trainer.gradient_finish import GradientFinish
    from dream_trainer.trainer.gradient_group import Update

Closure = Callable[[], Any]


def evaluation(
    update: Update, closure: Closure, finish: GradientFinish, num_accumulated: int
) -> Closure:
    """The user's closure, from zeroed gradients to clipped ones.

    Args:
        update: The optimizer.
        closure: Computes the loss and its gradients, and returns the loss.
        finish: Clips.
        num_accumulated: `gradient_accumulation_steps`.

    Raises:
        RuntimeError: If gradients would be of several batches; from the result, if there are none.
    """
    if num_accumulated != 1:
        raise RuntimeError(
            f"step({update.name}, closure) with gradient_accumulation_steps={num_accumulated}: the "
            "closure computes the whole gradient of a step; set gradient_accumulation_steps=1, and "
            "divide the batch inside the closure"
        )

    def evaluate() -> Any:
        update.zero_grad()
        update.group.forget()
        with torch.enable_grad():
            loss = closure()
        if all(parameter.grad is None for parameter in update.parameters):
            raise RuntimeError(
                f"the closure of {update.name} computed no gradient; call self.backward(loss) in "
                "it, and return the loss"
            )
        finish.generation += 1  # its backward may have been torch's
        finish.of(update.group, update)
        update.group.reshard()
        return loss

    return evaluate


def in_autocast(closure: Closure, device_type: str) -> Closure:
    """A closure that runs in the autocast that is on now, with the weights of each call."""
    if not torch.is_autocast_enabled(device_type):
        return closure
    dtype = torch.get_autocast_dtype(device_type)

    def within() -> Any:
        torch.clear_autocast_cache()
        with torch.autocast(device_type, dtype=dtype):
            return closure()

    return within


def needs_closure(update: Update) -> TypeError:
    """The error for a step without one."""
    return TypeError(
        f"{type(update.optimizer).__name__} evaluates the loss several times in a step: "
        f"self.step(self.{update.name}, closure), where closure() computes the loss, calls "
        "self.backward(loss) and returns the loss"
    )
