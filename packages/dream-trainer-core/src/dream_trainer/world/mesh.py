"""Device meshes from a mesh shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dream_trainer.configs.device import AXES, MeshShape
from dream_trainer.world import torch_private

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def build_mesh(shape: MeshShape, device_type: str) -> DeviceMesh:
    """The mesh of all ranks with every axis, including those of size 1.

    Collective: each rank must call it. Row-major: ranks of the last axis, `tp`, are adjacent.
    """
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, shape.sizes, mesh_dim_names=AXES)


def fsdp_mesh(mesh: DeviceMesh, shape: MeshShape) -> DeviceMesh:
    """The submesh for FSDP: replicas × shards, or shards alone.

    Context-parallel ranks are shards too: each has a part of the batch's gradient.
    Collective the first time, with `cp`.
    """
    shards = mesh["dp_shard"]
    if shape.cp > 1:
        shards = torch_private.flattened_mesh(mesh["dp_shard", "cp"], "dp_shard_cp")
    if shape.dp_replicate == 1:
        return shards
    return torch_private.concatenated_mesh([mesh["dp_replicate"], shards])


def coordinates(rank: int, shape: MeshShape) -> dict[str, int]:
    """Coordinate of a rank on each axis of the mesh; needs no process group."""
    place = {}
    for axis, size in zip(reversed(AXES), reversed(shape.sizes), strict=True):
        rank, place[axis] = divmod(rank, size)
    return place


def ordered_axes(axes: Sequence[str]) -> tuple[str, ...]:
    """Some axes in the mesh's order.

    Raises:
        ValueError: If there is no such axis, or none is given.
    """
    if not axes or set(axes) - set(AXES):
        raise ValueError(
            f"axes {', '.join(axes) or '(none)'}: some of {', '.join(AXES)} are required"
        )
    return tuple(axis for axis in AXES if axis in axes)
