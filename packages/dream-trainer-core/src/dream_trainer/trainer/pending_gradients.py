"""Gradients that no step has used yet, as part of the state: those of the user's own accumulation.

With `gradient_accumulation_steps` there are none when a state is saved, between two steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dream_trainer.callbacks.plain_data import RankLocal
from dream_trainer.world import torch_private

if TYPE_CHECKING:
    from dream_trainer.trainer.gradient_group import GradientGroup


def state_dict(groups: list[GradientGroup]) -> dict[str, Any]:
    """Pending gradients by model and parameter name, and their denominators; empty if none.

    Collective where gradients are partial sums over a mesh. Not copied.
    """
    gradients: dict[str, dict[str, Tensor]] = {}
    denominators: dict[str, float | Tensor] = {}
    for group in groups:
        owned = {
            id(parameter)
            for update in group.updates
            if update.is_pending or group.is_pending or not update.has_own_zero_grad
            for parameter in update.parameters
            if parameter.grad is not None
        }
        if not owned:
            continue
        for name, model in group.models.items():
            gradients[name] = {
                key: _whole_sum(parameter.grad)  # type: ignore[arg-type]  # owned have one
                for key, parameter in torch_private.named_parameters(model)
                if id(parameter) in owned
            }
        if group.denominator is not None:
            denominators[next(iter(group.models))] = group.denominator
    if not gradients:
        return {}
    return {"gradients": gradients, "denominators": RankLocal(denominators)}


def load_state_dict(groups: list[GradientGroup], state: Mapping[str, Any]) -> None:
    """Put saved gradients back, sharded like their parameters; without any, there are none after.

    Raises:
        KeyError: If a parameter isn't there.
    """
    saved = state.get("gradients", {})
    for group in groups:
        group.forget()
        for update in group.updates:
            update.is_pending = update.is_stale = False
            for parameter in update.parameters:
                parameter.grad = None
        for name, model in group.models.items():
            parameters = dict(torch_private.named_parameters(model))
            for key, gradient in saved.get(name, {}).items():
                if key not in parameters:
                    raise KeyError(
                        f"the state has a gradient of {name}.{key}, which no step has used yet, "
                        "and the model has no such parameter; use the model it was saved with"
                    )
                parameters[key].grad = _like(gradient, parameters[key])
        for update in group.updates:
            update.is_pending = any(p.grad is not None for p in update.parameters)
        group.is_pending = any(update.is_pending for update in group.updates)
        if group.is_pending:
            group.denominator = state.get("denominators", {}).get(next(iter(group.models)))


def _whole_sum(gradient: Tensor) -> Tensor:
    if type(gradient) is Tensor:
        return gradient
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(gradient, DTensor):
        return gradient
    return gradient.redistribute(
        placements=[Replicate() if each.is_partial() else each for each in gradient.placements]
    )


def _like(gradient: Tensor, parameter: nn.Parameter) -> Tensor:
    gradient = gradient.to(parameter.device)
    if type(parameter.data) is Tensor:
        return gradient
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or isinstance(gradient, DTensor):
        return gradient
    mesh, placements = parameter.device_mesh, parameter.placements
    with torch.no_grad():
        return distribute_tensor(gradient, mesh, placements, src_data_rank=None)
