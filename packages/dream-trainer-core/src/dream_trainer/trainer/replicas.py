"""Replicas: found to differ by digests of their parameters; buffers taken from the first one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dream_trainer.configs.device import AXES
from dream_trainer.world.dtensors import as_dtensor, local_part
from dream_trainer.world.rank_mismatch import grouped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dream_trainer.world.world import World

_BATCH_AXES = ("cp", "dp_shard", "dp_replicate")
"""Axes whose ranks compute different parts of a batch, so that their buffers may differ."""

_ROW = 1024
"""Words of 8 bytes in a row; a digest is a sum over rows, weighted by column."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NONE = 2**53


class ReplicaMismatch(RuntimeError):
    """Ranks have different values of a parameter that must be equal; raised on all of them."""


@torch.no_grad()
def refuse_different_replicas(models: Mapping[str, nn.Module], world: World, when: str) -> None:
    """Compare the copies of each parameter that ranks hold, bit by bit. Collective.

    One digest per parameter, computed on its device, one all-reduce per axis of the mesh over which
    parameters are replicated, and a device sync. Shards are compared with their own copies.

    Args:
        models: By name.
        world: Of several ranks, launched.
        when: Begins the error.

    Raises:
        ReplicaMismatch: On all ranks, if copies differ; it names the first parameter.
    """
    tensors = [
        (f"{model_name}.{name}", parameter)
        for model_name, model in models.items()
        for name, parameter in model.named_parameters()
        if type(local_part(parameter).detach()) is Tensor  # a quantized one has no bits to look at
    ]
    digests: dict[int, Tensor] = {}
    first = _NONE
    for axis, size in zip(AXES, world.shape.sizes, strict=True):
        compared = [i for i, (_, each) in enumerate(tensors) if size > 1 and _is_copied(each, axis)]
        if not compared:
            continue
        for i in compared:
            if i not in digests:
                digests[i] = _digest(local_part(tensors[i][1]).detach()).to(world.device)
        mine = torch.stack([digests[i] for i in compared])
        extremes = torch.stack([mine, ~mine])  # the largest; the complement of the smallest
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=world.get_mesh(axis).get_group())
        differs = (extremes[0] != ~extremes[1]).tolist()
        first = min([first, *(i for i, each in zip(compared, differs, strict=True) if each)])
    first = world.all_reduce(first, "min")
    if first == _NONE:
        return
    name, tensor = tensors[first]
    local = local_part(tensor).detach()
    wide = torch.complex128 if local.is_complex() else torch.float64
    norm = torch.linalg.vector_norm(local.to(wide)).item()
    norms = grouped([f"{each:.17g}" for each in world.all_gather(norm)])
    raise ReplicaMismatch(
        f"{when}, ranks have different values of {name}, and maybe of parameters after it; its "
        f"norm on {norms}. Replicas must stay equal: compute gradients with self.backward(loss), "
        "which averages them over ranks, and change weights and gradients alike on all ranks, with "
        "random numbers from a generator that has the same seed on each"
    )


@torch.no_grad()
def broadcast_buffers(models: Iterable[nn.Module], world: World) -> None:
    """Give all ranks the buffers of the first replica, as torch's DDP does. Collective.

    Without it each rank has the running statistics of its own part of the batches. Sharded buffers
    are left alone.

    Args:
        models: The same on all ranks.
        world: Of several ranks, launched.
    """
    axes = [axis for axis in _BATCH_AXES if getattr(world.shape, axis) > 1]
    by_kind: dict[Any, list[Tensor]] = {}
    for buffer in (each for model in models for each in model.buffers()):
        if type(buffer) is Tensor:
            by_kind.setdefault((buffer.dtype, buffer.device), []).append(buffer)
    for buffers in by_kind.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        for axis in axes:
            dist.broadcast(flat, group=world.get_mesh(axis).get_group(), group_src=0)
        parts = flat.split([buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view(buffer.shape))


def _is_copied(tensor: Tensor, axis: str) -> bool:
    """Whether ranks along an axis of the world's mesh must have the same local tensor."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return True
    names = sharded.device_mesh.mesh_dim_names or ()
    if not names or not {*names} <= {*AXES, "dp_shard_cp"}:
        return False  # a mesh of the user's own
    split = [n for n, p in zip(names, sharded.placements, strict=True) if not p.is_replicate()]
    return axis not in split and not (axis in ("dp_shard", "cp") and "dp_shard_cp" in split)


def _digest(tensor: Tensor) -> Tensor:
    """A number, int64 `()`, that depends on each bit of a tensor, and not on the order of sums."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    size = tensor.element_size()
    if tensor.storage_offset() * size % 8:
        tensor = tensor.clone()  # else it can't be read as words of 8 bytes
    flat = tensor.contiguous().view(-1)
    num_in_words = flat.numel() * size // 8 * 8 // size
    words = flat[:num_in_words].view(torch.int64)
    num_in_rows = words.numel() // _ROW * _ROW
    rest = torch.cat([words[num_in_rows:], flat[num_in_words:].view(_INTEGERS[size]).long()])
    # Sums of integers wrap around: exact in any order. Odd factors lose no bit.
    factors = torch.arange(1, 2 * _ROW + 16, 2, device=tensor.device)
    columns = words[:num_in_rows].view(-1, _ROW).sum(0)
    return (columns * factors[:_ROW]).sum() + (rest * factors[: rest.numel()]).sum()
