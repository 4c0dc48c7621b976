"""Gradients that would silently count in a wrong step, or in none."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dream_trainer.world import gradient_clipping, torch_private

if TYPE_CHECKING:
    from dream_trainer.trainer.gradient_group import Update
    from dream_trainer.world.replica_gradients import ReplicaGradients

logger = logging.getLogger(__name__)

Left = tuple["Update", nn.Parameter, Tensor]
"""A gradient that was there when another optimizer stepped."""


def set_aside(updates: Iterable[Update], *, copies: bool) -> list[Left]:
    """Take away the gradients of stale optimizers, to see whether a backward adds to them.

    Args:
        updates: Optimizers that the backward isn't only for.
        copies: Keep copies: gradients are views of DDP's buckets, which the backward fills.
    """
    left: list[Left] = []
    for update in updates:
        if update.is_stale:
            found = [(update, p, p.grad) for p in update.parameters if p.grad is not None]
            update.is_stale = update.is_pending = bool(found)
            left += [(u, p, gradient.clone()) for u, p, gradient in found] if copies else found
    for _, parameter, _ in left:
        parameter.grad = None
    return left


def refuse_unsharded(updates: Iterable[Update]) -> None:
    """Raise if FSDP has accumulated gradients for stale optimizers, which can't be set aside.

    Raises:
        RuntimeError: If it has.
    """
    for update in updates:
        if update.is_stale and torch_private.unreduced_parameters(update.group.model):
            raise _addition(update)


def refuse_unreduced(update: Update, replicas: ReplicaGradients | None) -> None:
    """Raise if an optimizer would step with gradients that ranks have not averaged.

    Only the backward of a step's last batch averages what the batches before accumulated: under
    FSDP of the units that it reaches, under DDP of the parameters that require gradients then.

    Raises:
        RuntimeError: If it would.
    """
    group = update.group
    unreduced = {id(p) for p in torch_private.unreduced_parameters(group.model)}
    if replicas is not None:
        unreduced |= {id(parameter) for parameter in replicas.unreduced_parameters()}
    if not unreduced:
        return
    unreduced &= {id(parameter) for parameter in update.parameters}
    # By order: FSDP may have put gathered parameters in the place of those that optimizers have.
    all_names = (f"{key}.{n}" for key, m in group.models.items() for n, _ in m.named_parameters())
    pairs = zip(all_names, group.parameters, strict=False)
    names = [name for name, parameter in pairs if id(parameter) in unreduced]
    if names:
        raise RuntimeError(
            f"step({update.name}): batches before accumulated gradients of {', '.join(names[:3])}"
            f"{f' and {len(names) - 3} more parameters' if names[3:] else ''}, and the last batch "
            "of the step computed none, so ranks haven't averaged them. Compute the same losses in "
            "each batch of a step; or, for losses that alternate, set "
            "gradient_accumulation_steps=1 and call self.step every few batches"
        )


def refuse_incomplete(update: Update) -> None:
    """Raise if gradients of another optimizer, scaled and clipped with its own, aren't complete.

    Raises:
        RuntimeError: If it had a backward in earlier batches of the step, and none in the last.
    """
    for other in update.group.updates:
        if other.is_pending and not (other.is_stale or other.has_backward):
            raise RuntimeError(
                f"step({update.name}) scales and clips the gradients of {other.name} too, since "
                "both optimizers share a model, and those are of earlier batches of the step only; "
                "in the last batch, call self.backward for all losses before the first self.step"
            )


def refuse_additions(left: Sequence[Left]) -> None:
    """Put gradients back that were set aside, unless the backward would have added to them.

    Host sync only before an error, and where an optimizer zeroes gradients instead of dropping
    them.

    Raises:
        RuntimeError: If it would have.
    """
    for update, parameter, gradient in left:
        if parameter.grad is None:
            parameter.grad = gradient
        elif bool(gradient_clipping.local_part(gradient).any()):
            raise _addition(update)


def _addition(update: Update) -> RuntimeError:
    return RuntimeError(
        f"this backward adds to gradients of {update.name} that were there before another "
        "optimizer's step: the backward of that step reached them too. If they aren't meant to "
        "count, let that backward reach one optimizer only: `with self.toggled(optimizer):` around "
        "its forward and self.backward(loss), or drop them: "
        f"`self.{update.name}.zero_grad()` before this backward"
    )


def require_gradient(update: Update, updates: Iterable[Update]) -> None:
    """Raise if there is nothing to step with, in any optimizer.

    Raises:
        RuntimeError: If no parameter has a gradient.
    """
    if not any(p.grad is not None for each in updates for p in each.parameters):
        raise RuntimeError(
            f"step({update.name}) without a gradient in any parameter; call self.backward(loss) "
            "before it, or pass a closure that does: self.step(optimizer, closure)"
        )


def warn_of_ownerless(
    models: Mapping[str, nn.Module],
    trained: Collection[nn.Module],
    updates: Iterable[Update],
    *,
    after_step: bool,
) -> None:
    """Warn of trainable parameters that no optimizer has.

    Args:
        models: All models.
        trained: Those that an optimizer has, at least in part.
        updates: The optimizers.
        after_step: Report those of the other models, if they have a gradient (a frozen copy of a
            model gets none), instead of those of models that are trained in part.
    """
    owned = {id(p) for update in updates for p in update.parameters}
    names = [
        f"{model_name}.{name}"
        for model_name, model in models.items()
        if after_step is (model not in trained)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in owned
        if not after_step or parameter.grad is not None
    ]
    if names:
        logger.warning(
            "no optimizer has %s%s, so they aren't trained; give them to one in "
            "configure_optimizers, or call requires_grad_(False) on them in configure_models",
            ", ".join(names[:5]),
            f" and {len(names) - 5} more parameters" if names[5:] else "",
        )
