"""Gradient norm and clipping, in one process and over shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None = None) -> Tensor:
    """L2 norm of all gradients of one process; clips them if `max_norm` is given.

    No host synchronization.

    Args:
        parameters: Those without a gradient count as zero.
        max_norm: Scale all gradients by `max_norm / norm` where that is below 1.

    Returns:
        Scalar `()`: the norm before clipping.

    Raises:
        ValueError: If no parameter has a gradient.
    """
    parameters = _with_gradient(parameters)
    norm = _norm(parameters)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def clip_sharded_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float | None = None
) -> Tensor:
    """L2 norm of all gradients, over every shard; clips them if `max_norm` is given.

    Collective over the meshes of sharded parameters: each rank must call it with its own
    shards of the same parameters. No host synchronization. Replicated gradients count once. There
    is one norm per mesh, then the norm of these: torch can't mix meshes in one operation.

    Args:
        parameters: Those without a gradient count as zero.
        max_norm: Scale all gradients by `max_norm / norm` where that is below 1.

    Returns:
        Scalar `()`, equal on all ranks: the norm before clipping.

    Raises:
        ValueError: If no parameter has a gradient.
    """
    groups = _grouped(_with_gradient(parameters), _mesh_of).values()
    norms = [_full_tensor(_norm(group)) for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for group in groups:
            _clip(group, max_norm, norm)
    return norm


def _clip(parameters: Iterable[nn.Parameter], max_norm: float, norm: Tensor) -> None:
    """Scale the gradients of one mesh by the norm of all gradients."""
    for is_unsummed, group in _grouped(parameters, _is_unsummed).items():
        # With foreach, torch 2.11 silently leaves these unscaled.
        foreach = False if is_unsummed else None
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm, foreach=foreach)


def _with_gradient(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if not parameters:
        raise ValueError(
            "no parameter has a gradient; call self.backward(loss) before self.step(optimizer)"
        )
    return parameters


def _norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _grouped(
    parameters: Iterable[nn.Parameter], key: Callable[[nn.Parameter], Any]
) -> dict[Any, list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(key(parameter), []).append(parameter)
    return groups


def _mesh_of(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import DTensor

    return parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None


def _is_unsummed(parameter: nn.Parameter) -> bool:
    """Whether a gradient is a partial sum over a mesh, as with sequence parallelism."""
    from torch.distributed.tensor import DTensor

    gradient = parameter.grad
    return isinstance(gradient, DTensor) and any(p.is_partial() for p in gradient.placements)


def _full_tensor(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
