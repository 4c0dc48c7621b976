"""Norm, clipping and scaling of gradients, in one process and over shards.

Nothing here waits for the device. Gradients are changed in place: those of DTensors in their local
part, those of sparse tensors in their values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.world import dtensors, torch_private
from dream_trainer.world.dtensors import as_dtensor


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """The gradients that exist, in order; sparse ones coalesced, so that they have values."""
    found = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            if gradient.is_sparse and not gradient.is_coalesced():
                gradient = parameter.grad = gradient.coalesce()
            found.append(gradient)
    return found


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients together, over every shard.

    Collective over the meshes of DTensors: each rank must call it with its own shards of the same
    gradients. Replicated gradients count once. There is one norm per mesh, then the norm of these:
    torch can't mix meshes in one operation.

    Args:
        gradients: As `gradients_of` returns them; zero if there are none.

    Returns:
        Scalar `()`, equal on all ranks.
    """
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        sharded = as_dtensor(gradient)
        mesh = None if sharded is None else sharded.device_mesh
        by_mesh.setdefault(mesh, []).append(gradient.values() if gradient.is_sparse else gradient)
    norms = [_full(torch.nn.utils.get_total_norm(each)) for each in by_mesh.values()]
    if not norms:
        return torch.zeros(())
    if len(norms) == 1:
        return norms[0]
    on_one_device = torch.stack([norm.to(norms[0].device) for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(on_one_device)
    return norm


@torch.no_grad()
def scale(gradients: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply gradients by a scalar `()`, the same on all ranks."""
    for (device, _), tensors in by_device_and_dtype(gradients).items():
        torch_private.multiply(tensors, factor.to(device))


def clip_norm(gradients: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scale gradients by `max_norm / norm` where that is below 1 (Pascanu et al., 2013)."""
    scale(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))


@torch.no_grad()
def clip_value(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp each element of the gradients to [-limit, limit].

    Collective where a gradient is a partial sum over a mesh, which is summed first.
    """
    for parameter in parameters:
        sharded = as_dtensor(parameter.grad)
        if sharded is not None and any(each.is_partial() for each in sharded.placements):
            from torch.distributed.tensor import Replicate

            parameter.grad = sharded.redistribute(
                placements=[Replicate() if p.is_partial() else p for p in sharded.placements]
            )
    for tensors in by_device_and_dtype(gradients_of(parameters)).values():
        torch_private.clamp(tensors, limit)


def local_part(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient; the values of a sparse one. Shares its memory."""
    if gradient.is_sparse:
        return gradient.values()
    return dtensors.local_part(gradient)


def by_device_and_dtype(gradients: Iterable[Tensor]) -> dict[Any, list[Tensor]]:
    """Local parts of gradients, for foreach operations.

    In those, torch 2.11 silently leaves DTensors that are partial sums as they are.
    """
    groups: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        local = local_part(gradient)
        groups.setdefault((local.device, local.dtype), []).append(local)
    return groups


def _full(tensor: Tensor) -> Tensor:
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.full_tensor()
