"""Layouts of up to 1,024 ranks without their hardware.

Everything runs in a child process, so that this one is unchanged.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch.distributed as dist
from torch import nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.configs.device import AXES
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import SimulatedWorld, World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

PARAMETERS: dict[str, Callable[..., DeviceParameters]] = {
    "ddp": DeviceParameters.DDP,
    "fsdp": DeviceParameters.FSDP,
    "hsdp": partial(DeviceParameters.HSDP, dp_shard=8),
    "ddp+tp": partial(DeviceParameters.DDP, tensor_parallel=8),
    "fsdp+tp": partial(DeviceParameters.FSDP, tensor_parallel=8),
    "hsdp+tp": partial(DeviceParameters.HSDP, dp_shard=4, tensor_parallel=2),
    "fsdp+cp": partial(DeviceParameters.FSDP, context_parallel=4),
    "hsdp+tp+cp": partial(DeviceParameters.HSDP, dp_shard=2, tensor_parallel=2, context_parallel=4),
    "fsdp+tp+cp+pp": partial(
        DeviceParameters.FSDP, tensor_parallel=2, context_parallel=2, pipeline_parallel=4
    ),
}
WORLD_SIZES = (32, 64, 1024)


def fsdp_shape(world: World) -> tuple[int, ...]:
    """Shape of the mesh for FSDP; raises if torch's deprecated slicing makes it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Slicing a flattened dim")
        return tuple(world.fsdp_mesh.shape)


def mesh_of(name: str, world_size: int) -> list[dict[str, Any]]:
    """The mesh from the view of a few ranks."""
    seen = []
    for rank in sorted({0, 1, world_size // 2 - 1, world_size - 1}):
        world = SimulatedWorld(PARAMETERS[name](), rank=rank, world_size=world_size)
        world.launch()
        assert world.mesh.mesh_dim_names == AXES
        seen.append(
            {
                "rank": rank,
                "layout": world.shape.layout,
                "sizes": tuple(world.mesh.shape),
                "place": tuple(world.place[axis] for axis in AXES),
                "in_mesh": tuple(world.mesh.get_coordinate() or ()),
                "data": (world.dp_rank, world.dp_size, world.data_part),
                "tp_group": dist.get_process_group_ranks(world.mesh.get_group("tp")),
                "fsdp": fsdp_shape(world),
            }
        )
        world.shutdown()
    return seen


@pytest.mark.parametrize("name", PARAMETERS)
def test_meshes_of_up_to_1024_ranks(name: str) -> None:
    for world_size in WORLD_SIZES:
        (seen,) = run_on_ranks(mesh_of, 1, name, world_size)
        shape = PARAMETERS[name]().mesh_shape(world_size)
        for found in seen:
            assert found["layout"] == name
            assert found["sizes"] == shape.sizes
            assert found["place"] == found["in_mesh"]
            # Tensor-parallel ranks are adjacent: on one machine, with the fastest links.
            first = found["rank"] // shape.tp * shape.tp
            assert found["tp_group"] == list(range(first, first + shape.tp))
            copies = (shape.dp_replicate,) if shape.dp_replicate > 1 else ()
            assert found["fsdp"] == (*copies, shape.dp_shard * shape.cp)


def test_tensor_and_context_parallel_ranks_read_the_same_data() -> None:
    parameters = PARAMETERS["hsdp+tp+cp"](device="cpu")

    places = []
    for rank in range(1024):
        world = SimulatedWorld(parameters, rank=rank, world_size=1024)
        places.append((world.dp_rank, world.cp_rank, world.tp_rank))
        assert world.data_part == world.dp_rank * 4 + world.cp_rank

    assert len(set(places)) == 1024
    assert {dp_rank for dp_rank, *_ in places} == set(range(128))


# Degrees


@pytest.mark.parametrize("world_size", [1, 6, 96, 1000, 1024])
def test_degrees_multiply_to_the_ranks_or_are_refused_with_the_numbers(world_size: int) -> None:
    degrees = ("dp_replicate", "dp_shard", "tensor_parallel", "pipeline_parallel")
    accepted = 0
    for values in itertools.product((1, 2, 3, 8, "auto"), repeat=len(degrees)):
        if values.count("auto") > 1:
            continue
        fields: dict[str, Any] = dict(zip(degrees, values, strict=True))
        product = math.prod(value for value in values if isinstance(value, int))
        fits = world_size % product == 0 if "auto" in values else world_size == product
        parameters = DeviceParameters(**fields)
        if fits:
            assert parameters.mesh_shape(world_size).world_size == world_size
            accepted += 1
            continue
        with pytest.raises(ValueError, match="start ") as caught:
            parameters.mesh_shape(world_size)
        assert f"{world_size} rank" in str(caught.value)
        assert str(product) in str(caught.value)

    assert accepted > 0


# Models


class Wide(TinyTrainer):
    """Wide enough for a shard on each of 1,024 ranks."""

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        columns = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self.model, mesh, {"blocks.*": columns})

    def init_weights(self) -> None:
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)


def local_shapes(name: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global and local shape of a block's weight."""
    config = tiny_config("runs", device=PARAMETERS[name](device="cpu"))
    config.width, config.num_blocks = 1024, 1
    config.num_samples, config.batch_size = 4096, 1024
    trainer = Wide(config, world=SimulatedWorld(rank=rank, world_size=1024))
    trainer.configure()
    assert all(parameter.is_meta for parameter in trainer.model.parameters())
    trainer.setup()
    weight: Any = trainer.model.blocks[0].weight
    return tuple(weight.shape), tuple(weight.to_local().shape)


@pytest.mark.parametrize(
    ("name", "num_parts"),
    [("fsdp", 1024), ("hsdp", 8), ("ddp+tp", 8), ("fsdp+tp", 1024), ("hsdp+tp", 8)],
)
def test_each_of_1024_ranks_gets_its_part_of_the_model(name: str, num_parts: int) -> None:
    for rank in (0, 1023):
        ((whole, mine),) = run_on_ranks(local_shapes, 1, name, rank)

        assert whole == (1024, 1024)
        assert mine == (1024 // num_parts, 1024)
