"""State of an optimizer by parameter name, in the form of torch.distributed.checkpoint.

Torch's own functions create the state of an optimizer that hasn't stepped by a step with zero
gradients, which optimizers with a closure refuse, and which others count. Nothing here steps.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from dream_trainer.world import torch_private


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, and of optimizers that it wraps. Not collective; no copies.

    Args:
        model: Has all its parameters.
        optimizer: Sharded where the parameters are.

    Returns:
        `{"state": {name: …}, "param_groups": [{"params": names, …}]}`, any other entries of
        `optimizer.state_dict()`, and `"wrapped": {attribute: …}` if there are any.

    Raises:
        TypeError: If its `state_dict()` has another form.
    """
    names = {id(p): name for name, p in torch_private.named_parameters(model)}
    state = dict(optimizer.state_dict())
    if not isinstance(state.get("state"), dict) or "param_groups" not in state:
        raise TypeError(
            f"{type(optimizer).__name__}.state_dict() has the keys {sorted(map(str, state))}; "
            "'state' and 'param_groups' as in torch.optim.Optimizer are required to save it"
        )
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    state["state"] = {
        ordered[key] if isinstance(key, int) else key: value
        for key, value in state["state"].items()
    }
    state["param_groups"] = [
        {**group, "params": [ordered[index] for index in group["params"]]}
        for group in state["param_groups"]
    ]
    if wrapped := _wrapped(optimizer):
        state["wrapped"] = {
            attribute: optimizer_state(model, each) for attribute, each in wrapped.items()
        }
    return state


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Continue with a state that `optimizer_state` returned, maybe of other groups.

    A parameter without saved state has none, as before its first gradient. A group gets the options
    of the saved group that has its parameters; a group without any keeps its own.
    """
    names = {id(p): name for name, p in torch_private.named_parameters(model)}
    own = optimizer.state_dict()["param_groups"]
    groups: list[dict[str, Any]] = []
    state: dict[str, Any] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = [names[id(parameter)] for parameter in group["params"]]
        before = _matching(saved["param_groups"], set(members), index)
        groups.append({**(own[index] if before is None else before), "params": members})
        state |= {name: saved["state"][name] for name in members if name in saved["state"]}
    rest = {key: value for key, value in saved.items() if key != "wrapped"}
    inner = [each for each in vars(optimizer).values() if isinstance(each, Optimizer)]
    same_groups = [each for each in inner if each.param_groups is optimizer.param_groups]
    same_state = [each for each in inner if each.state is optimizer.state]
    wrapped = _wrapped(optimizer)
    optimizer.load_state_dict({**rest, "state": state, "param_groups": groups})
    for attribute, each in wrapped.items():
        if attribute in saved.get("wrapped", {}):
            load_optimizer_state(model, each, saved["wrapped"][attribute])
    for each in same_groups:  # loading replaces them, and a scheduler changes the outer ones
        each.param_groups = optimizer.param_groups
    for each in same_state:
        each.state = optimizer.state


def _matching(saved: list[dict[str, Any]], members: set[str], index: int) -> dict[str, Any] | None:
    """The saved group of some parameters; for an empty group, an empty one at its place."""
    group: dict[str, Any]
    for group in reversed(saved):
        if not members.isdisjoint(group["params"]):
            return group
    if members or index >= len(saved) or saved[index]["params"]:
        return None
    return saved[index]


def _wrapped(optimizer: Optimizer) -> dict[str, Optimizer]:
    """Optimizers that one delegates to, such as SAM's, with a state of their own."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if isinstance(value, Optimizer) and value.state is not optimizer.state
    }
