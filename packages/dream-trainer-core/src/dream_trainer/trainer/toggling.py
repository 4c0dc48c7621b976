"""Gradients for the parameters of one optimizer alone, in every layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from dream_trainer.world import torch_private

if TYPE_CHECKING:
    from dream_trainer.trainer.gradient_group import Update


@contextmanager
def only(
    update: Update,
    models: Mapping[str, nn.Module],
    owned: Iterable[Iterable[nn.Parameter]],
    syncs_gradients: bool,
) -> Iterator[None]:
    """Inside, no other parameter than those of an optimizer requires a gradient.

    Args:
        update: The optimizer.
        models: All models.
        owned: Parameters of each optimizer.
        syncs_gradients: Whether DDP reduces the gradients of this batch.

    Raises:
        ValueError: If DDP holds a model of which the optimizer has a part.
    """
    for model in models.values():
        torch_private.reshard(model)  # a gathered parameter keeps its own requires_grad
    mine = {id(parameter) for parameter in update.parameters}
    of_models = (list(model.parameters()) for model in models.values())
    everything = {id(p): p for part in (*owned, *of_models) for p in part}
    others = [p for key, p in everything.items() if p.requires_grad and key not in mine]
    idle = _without_gradients(update, models, mine)
    for parameter in others:
        parameter.requires_grad_(False)
    for module in idle:
        torch_private.set_ddp_sync(module, False)
    try:
        yield
    finally:
        for model in models.values():
            torch_private.reshard(model)
        for parameter in others:
            parameter.requires_grad_(True)
        for module in idle:
            torch_private.set_ddp_sync(module, syncs_gradients)


def _without_gradients(
    update: Update, models: Mapping[str, nn.Module], mine: set[int]
) -> list[nn.Module]:
    """Modules under DDP that get no gradient: DDP would wait for theirs."""
    idle = []
    for name, model in models.items():
        for module in torch_private.ddp_modules(model):
            trainable = [p for p in module.parameters() if p.requires_grad]
            num_mine = sum(id(parameter) in mine for parameter in trainable)
            if num_mine == 0:
                idle.append(module)
            elif num_mine < len(trainable):
                raise ValueError(
                    f"toggled({update.name}): the optimizer has {num_mine} of the "
                    f"{len(trainable)} parameters of {name!r}, and DDP reduces all or none; assign "
                    "the parts to attributes of their own in configure_models, or use "
                    "DeviceParameters.FSDP"
                )
    return idle
