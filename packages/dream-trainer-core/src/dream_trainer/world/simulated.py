"""SimulatedWorld: one rank of a large world in a single process, without the others."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dream_trainer.configs.device import DeviceParameters
from dream_trainer.world import collectives, torch_private
from dream_trainer.world.collectives import ReduceOp
from dream_trainer.world.determinism import LocalTensorRandom
from dream_trainer.world.faults.failure_monitor import NoFailureMonitor
from dream_trainer.world.world import World

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class SimulatedWorld(World):
    """One rank of a world whose other ranks don't exist, to try a layout without its machines.

    `MyTrainer(config, world=SimulatedWorld(rank=3, world_size=1024))` runs `configure()` and
    `setup()` in this process, on the CPU whatever `device_parameters.device` says: models are
    sharded and hold this rank's part, with optimizers, loaders, metrics and the callbacks' hooks
    up to `post_setup`. There are no sockets, stores, threads or signal handlers, and nothing
    blocks. `fit()` raises RuntimeError: simulated ranks have neither data nor gradients.

    The simulation assumes that **the other ranks do and hold exactly what this one does.**

    - `all_reduce`: "mean", "min" and "max" give the value, "sum" the value times `world_size`.
    - `all_gather`: this rank's value, `world_size` times. A tensor is a view of one copy that
      can't be written to, a list has one copy of an object many times.
    - `broadcast`, `broadcast_object`: this rank's value, for any source.
    - `agree` agrees; `any_rank` and `all_ranks` give the condition; `barrier` returns.
    - `group(kind)` is None, as in a world of one. To torch.distributed None is the default group,
      of `world_size` ranks.
    - Collectives of torch.distributed go to its fake process group and return at once. They move
      no data: buffers are unchanged, or get this rank's values. Don't rely on results.
    - `init_weights` gives random weights of the right distributions, drawn for this rank's part
      only, so they differ from a run's. Without it, tensor-parallel parameters have undefined
      values, since torch scatters them from rank 0. Other random numbers may differ too.
    - `trainer.state_dict()` has only this rank's part, and returns without blocking.

    One at a time: connecting one shuts down the previous one. `shutdown()`, and leaving
    `with SimulatedWorld(…) as world:`, destroy the fake process group. Local tensors can be read
    afterwards (`tensor.to_local()`), but operations on DTensors must be inside: torch doesn't
    distinguish the meshes of two ranks.

    Args:
        parameters: Layout. Default: `device_parameters` of the config of the trainer that this
            world is given to; until then it has no layout, mesh or device.
        rank: The simulated rank.
        world_size: Number of ranks.
        ranks_per_node: For `local_rank`, which is `rank % ranks_per_node`.

    Raises:
        ValueError: If `rank` is out of range, or the layout doesn't fit `world_size`.
    """

    def __init__(
        self,
        parameters: DeviceParameters | None = None,
        *,
        rank: int,
        world_size: int,
        ranks_per_node: int = 8,
    ) -> None:
        if world_size < 1 or ranks_per_node < 1:
            raise ValueError(
                f"world_size={world_size}, ranks_per_node={ranks_per_node}: both must be at least 1"
            )
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank={rank} of world_size={world_size}: a rank from 0 to {world_size - 1} is "
                "required"
            )
        self.rank, self.world_size = rank, world_size
        self.local_rank = rank % ranks_per_node
        if parameters is not None:
            super().__init__(parameters)

    def __repr__(self) -> str:
        return f"SimulatedWorld(rank={self.rank}, world_size={self.world_size})"

    def __getattr__(self, name: str) -> Any:
        # Called only for missing attributes.
        if "parameters" in vars(self) or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise AttributeError(
            f"{self} has no layout yet, and so no {name}; give it to a trainer, as in "
            "MyTrainer(config, world=world), or make it with DeviceParameters"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if "parameters" in vars(self):
            self.shutdown()

    # Which rank this is

    def _start_ranks(self, parameters: DeviceParameters) -> None:
        pass  # they are simulated

    def _identify(self) -> None:
        pass  # as given, not from the environment

    def _choose_device(self) -> torch.device:
        return torch.device("cpu")

    def lay_out(self, parameters: DeviceParameters) -> None:
        """Use the layout of a trainer's config; if there is one already, check that it is equal.

        Raises:
            ValueError: If the layout doesn't fit the number of ranks, or isn't equal.
        """
        if "parameters" in vars(self):
            super().lay_out(parameters)
        else:
            super().__init__(parameters)

    # Life

    def connect(self) -> None:
        """Create the fake process group, replacing that of the previous SimulatedWorld.

        Raises:
            RuntimeError: If this process has a process group of another kind.
        """
        if not self._owns_process_group and dist.is_initialized():
            _shut_down_connected(self)
        super().connect()

    def _init_process_group(self) -> None:
        global _connected  # noqa: PLW0603  # torch has one default group for the process
        torch_private.clear_sharding_caches()
        torch_private.init_fake_process_group(self.rank, self.world_size)
        _connected = self

    def shutdown(self) -> None:
        """Destroy the fake process group. A second call does nothing."""
        global _connected  # noqa: PLW0603
        super().shutdown()
        if _connected is self:
            _connected = None
            torch_private.clear_sharding_caches()

    def abandon(self) -> None:
        """Shut down; never blocks."""
        self.shutdown()

    def failure_monitor(self) -> NoFailureMonitor:
        """A monitor that does nothing. Not public."""
        assert isinstance(self._failure_monitor, NoFailureMonitor)
        return self._failure_monitor

    def require_all_ranks(self, action: str) -> None:
        """Raise, since the other ranks are simulated.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"{action} in {self}: the other ranks are simulated, with neither data nor gradients, "
            "so its results would be wrong; configure() and setup() work here. To train, "
            f"leave out world=… and start {self.world_size} ranks with torchrun"
        )

    def sharded_random(self) -> AbstractContextManager[Any]:
        """A context in which sharded tensors get random numbers for this rank's part only."""
        return LocalTensorRandom()  # type: ignore[no-untyped-call]  # torch's

    def _set_timeouts(self, timeout_s: float) -> None:
        pass  # nothing takes time

    # Together

    def group(self, kind: str = "control") -> ProcessGroup | None:
        """None, as in a world of one."""
        return None

    def all_reduce(self, value: Any, op: ReduceOp = "mean") -> Any:
        """The value reduced as if all ranks had it; as `World.all_reduce`."""
        self._refuse_if_guarded("all_reduce")
        result = collectives.reduced(value, op, None)
        return _multiplied(result, self.world_size) if op == "sum" else result

    def all_gather(self, value: Any) -> Any:
        """The value once per rank, sharing one copy."""
        self._refuse_if_guarded("all_gather")
        if isinstance(value, Tensor):
            return value.detach().clone().expand(self.world_size, *value.shape)
        return [_as_sent(value)] * self.world_size

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """The value, for any `src`; it must be picklable."""
        self._refuse_if_guarded("broadcast_object")
        _as_sent(value)
        return value


_connected: SimulatedWorld | None = None
"""The world that made torch's default process group."""


def _shut_down_connected(newcomer: SimulatedWorld) -> None:
    if _connected is None or dist.get_backend() != torch_private.FAKE_BACKEND:
        raise RuntimeError(
            f"{newcomer} can't be connected: this process already has a process group of "
            f"{dist.get_world_size()} ranks with backend {dist.get_backend()!r}; call "
            "torch.distributed.destroy_process_group() first, or simulate in a separate process"
        )
    _connected.shutdown()


def _multiplied(value: Any, factor: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _multiplied(each, factor) for key, each in value.items()}
    return value * factor


def _as_sent(value: T) -> T:
    """A pickled copy, as another rank would get it; raises if it can't be pickled."""
    copy: T = pickle.loads(pickle.dumps(value))  # noqa: S301  # our own
    return copy
