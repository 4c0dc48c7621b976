"""RankIdentity: rank, world size, device and mesh coordinates of this process."""

from __future__ import annotations

import os

import torch

from dream_trainer.configs.device import DeviceParameters, MeshShape
from dream_trainer.world.device import device_of_rank
from dream_trainer.world.mesh import coordinates


class RankIdentity:
    """Rank and world size from the environment that torchrun sets; without it rank 0 of 1.

    Args:
        parameters: Layout and device.

    Raises:
        ValueError: If the layout doesn't fit the number of ranks, or the environment is
            incomplete.
        RuntimeError: If the device doesn't exist.
    """

    def __init__(self, parameters: DeviceParameters) -> None:
        self.parameters = parameters
        self._identify()
        self.shape: MeshShape = parameters.mesh_shape(self.world_size)
        self.place = coordinates(self.rank, self.shape)
        self.device = self._choose_device()

    def _identify(self) -> None:
        """Set rank, local rank and world size."""
        self.world_size = _from_environment("WORLD_SIZE", 1)
        self.rank = _from_environment("RANK", 0)
        self.local_rank = _from_environment("LOCAL_RANK", 0)
        if self.world_size > 1 and "RANK" not in os.environ:
            raise ValueError(
                f"WORLD_SIZE={self.world_size} is set and RANK isn't; start the script with "
                "torchrun, which sets both, or unset WORLD_SIZE"
            )

    def _choose_device(self) -> torch.device:
        return device_of_rank(self.parameters.device, self.rank, self.local_rank, self.world_size)

    def use_device(self) -> None:
        """Make this rank's device the current one of the calling thread. Not collective.

        The current device of CUDA and XPU belongs to a thread, and is device 0 in a new one: call
        this first in every thread that uses tensors.
        """
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.device)

    @property
    def is_global_zero(self) -> bool:
        return self.rank == 0

    @property
    def is_local_zero(self) -> bool:
        return self.local_rank == 0

    @property
    def dp_rank(self) -> int:
        """Index of this rank's part of the data, of `dp_size`."""
        return self.place["dp_replicate"] * self.shape.dp_shard + self.place["dp_shard"]

    @property
    def dp_size(self) -> int:
        return self.shape.dp_size

    @property
    def tp_rank(self) -> int:
        return self.place["tp"]

    @property
    def tp_size(self) -> int:
        return self.shape.tp

    @property
    def cp_rank(self) -> int:
        return self.place["cp"]

    @property
    def cp_size(self) -> int:
        return self.shape.cp

    @property
    def data_part(self) -> int:
        """Index of this rank's part of a global batch, by which dropout is seeded."""
        return self.dp_rank * self.cp_size + self.cp_rank

    @property
    def pp_rank(self) -> int:
        return self.place["pp"]

    @property
    def pp_size(self) -> int:
        return self.shape.pp

    @property
    def is_distributed(self) -> bool:
        """Whether there is more than one rank."""
        return self.world_size > 1


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if not text.isdigit():
        raise ValueError(f"the environment has {name}={text!r}; a whole number is required")
    return int(text)
