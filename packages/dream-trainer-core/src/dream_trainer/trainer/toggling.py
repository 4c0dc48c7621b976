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
) -> Iterator[None]:
    """Inside, no other parameter than those of an optimizer requires a gradient.

    Args:
        update: The optimizer.
        models: All models.
        owned: Parameters of each optimizer.
    """
    for model in models.values():
        torch_private.reshard(model)  # a gathered parameter keeps its own requires_grad
    mine = {id(parameter) for parameter in update.parameters}
    of_models = (list(model.parameters()) for model in models.values())
    everything = {id(p): p for part in (*owned, *of_models) for p in part}
    others = [p for key, p in everything.items() if p.requires_grad and key not in mine]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for model in models.values():
            torch_private.reshard(model)
        for parameter in others:
            parameter.requires_grad_(True)
