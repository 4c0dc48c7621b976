"""World: the ranks of a run, their process groups, mesh and collectives."""

from __future__ import annotations

import atexit
import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import wait
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dream_trainer.configs.device import DeviceParameters
from dream_trainer.world import collectives, cpu_collectives, torch_private, torchrun
from dream_trainer.world.collectives import ReduceOp
from dream_trainer.world.coordination import Coordination
from dream_trainer.world.daemon_thread import call_in_daemon_thread
from dream_trainer.world.determinism import seed_all, use_deterministic_algorithms
from dream_trainer.world.device import backends, claim
from dream_trainer.world.faults import collective_guard
from dream_trainer.world.faults.device_collectives import (
    DeviceCollectives,
    leave_failures_to_python,
)
from dream_trainer.world.faults.failure_monitor import FailureMonitor, NoFailureMonitor
from dream_trainer.world.faults.fork_safety import let_threads_settle_before_forks
from dream_trainer.world.full_tensor_init import FullTensorInit
from dream_trainer.world.identity import RankIdentity
from dream_trainer.world.mesh import build_mesh, fsdp_mesh, ordered_axes
from dream_trainer.world.open_files import raise_open_file_limit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

_ABANDON_S = 1.0


class World(RankIdentity):
    """The ranks of a run: process groups, device mesh and collectives.

    A process that torchrun didn't start is a world of one: no process group, no port, and every
    method works. Rank and world size are known before `launch`.

    Args:
        parameters: Layout, device and timeouts.

    Raises:
        ValueError: If the layout doesn't fit the number of ranks, or the environment is
            incomplete.
        RuntimeError: If the device doesn't exist.
    """

    def __init__(self, parameters: DeviceParameters) -> None:
        self._start_ranks(parameters)
        super().__init__(parameters)
        self._mesh: DeviceMesh | None = None
        self._fsdp_mesh: DeviceMesh | None = None
        self._groups: dict[str, ProcessGroup] = {}
        self._owns_process_group = False
        self._timeout_s = parameters.init_timeout_s
        self._refusal: tuple[str, str] | None = None
        self._store: Store | None = None
        self._device_collectives = DeviceCollectives(self.rank)
        self._failure_monitor: NoFailureMonitor | FailureMonitor = NoFailureMonitor()

    # Life

    def _start_ranks(self, parameters: DeviceParameters) -> None:
        """Under `@entrypoint`, become the launcher of the ranks."""
        torchrun.start_ranks_if_needed(parameters)

    def lay_out(self, parameters: DeviceParameters) -> None:
        """Check that this world has the parameters of a trainer's config. Not collective.

        Raises:
            ValueError: If it was made with other parameters; it shows both.
        """
        different = [
            f"{each.name}={getattr(self.parameters, each.name)!r} in the world and "
            f"{getattr(parameters, each.name)!r} in the config"
            for each in fields(DeviceParameters)
            if getattr(self.parameters, each.name) != getattr(parameters, each.name)
        ]
        if different:
            raise ValueError(
                f"the world and the trainer's config have different device_parameters: "
                f"{'; '.join(different)}; make the world with config.device_parameters"
            )

    def require_all_ranks(self, action: str) -> None:
        """Raise if `action` is impossible because the ranks are simulated. Not collective.

        Args:
            action: Named in the error.
        """

    def failure_monitor(self) -> NoFailureMonitor | FailureMonitor:
        """The monitor that reports errors between ranks. Not public.

        The first call connects to the store, and blocks until it exists.
        """
        if self._store is None and self.is_distributed:
            torchrun.end_with_launcher()
            timeout_s = self.parameters.init_timeout_s
            self._store = torchrun.open_store(self.rank, self.world_size, timeout_s)
            cleanup_timeout_s = self.parameters.cleanup_timeout_s
            self._failure_monitor = FailureMonitor(
                self._store,
                self.rank,
                self.world_size,
                cleanup_timeout_s,
                self._device_collectives,
            )
        return self._failure_monitor

    def connect(self) -> None:
        """Create the process group. Collective; a second call does nothing.

        Afterwards ranks can compare their layouts: different ones would deadlock in `launch`.
        """
        if self.parameters.deterministic:
            use_deterministic_algorithms()
        self.use_device()
        if not self.is_distributed or dist.is_initialized():
            return
        self._init_process_group()
        self._owns_process_group = True
        atexit.register(self.shutdown)

    def _init_process_group(self) -> None:
        let_threads_settle_before_forks()
        self.failure_monitor()
        assert self._store is not None, "failure_monitor() opened it"
        raise_open_file_limit(self.world_size)
        if self.device.type == "cuda":
            leave_failures_to_python()
        if self.device.type != "cpu":
            claim(self.device, self.rank, self._store)
        dist.init_process_group(
            backends(self.device),
            store=self._store,
            rank=self.rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=self.parameters.init_timeout_s),
            device_id=None if self.device.type == "cpu" else self.device,
        )

    def launch(self) -> None:
        """Connect, and create the mesh. Collective; a second call does nothing."""
        self.connect()
        if self.is_distributed and self._mesh is None:
            self._mesh = build_mesh(self.shape, self.device.type)
            self._set_timeouts(self.parameters.init_timeout_s)

    def shutdown(self) -> None:
        """Destroy the process group, if `launch` made one. A second call does nothing."""
        self._mesh = self._fsdp_mesh = None
        self._groups.clear()
        if self._owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self._owns_process_group = False
        self._failure_monitor.close()
        atexit.unregister(self.shutdown)

    def abandon(self) -> None:
        """Shut down after an error. Stuck collectives are aborted, or waited for at most 1 s."""
        if not self.is_distributed:
            self.shutdown()
            return
        atexit.unregister(self.shutdown)  # it would wait again
        wait([call_in_daemon_thread("abandon-world", self._abandon)], _ABANDON_S)

    def _abandon(self) -> None:
        wait(self._device_collectives.abort())  # else `shutdown` waits for their kernels
        self.use_device()
        self.shutdown()

    def seed(self, seed: int | None) -> int:
        """Seed all generators, with the same seed on all ranks. Collective if `seed` is None.

        Returns:
            The seed; drawn by rank 0 if `seed` is None.
        """
        if seed is None:
            seed = self.broadcast_object(random.SystemRandom().randrange(2**31))
        seed_all(seed)
        return seed

    def seed_parts(self, seed: int) -> None:
        """Seed all generators by this rank's part of the data; tensor-parallel ranks alike."""
        seed_all(seed + self.data_part)
        if self.tp_size > 1 and self.device.type != "cpu":
            torch_private.seed_sharded_random(seed + self.data_part, self.get_mesh("tp"))

    def sharded_random(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which sharded tensors are initialized as full ones are."""
        return FullTensorInit(self.device)

    def tighten_timeouts(self) -> None:
        """Change the timeout of collectives from `init_timeout_s` to `train_timeout_s`.

        Collective, with a device sync: a collective that still waits on the device, perhaps for a
        rank that compiles, began under the longer timeout.
        """
        if self.is_distributed:
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            self.barrier()
            self._set_timeouts(self.parameters.train_timeout_s)

    def _set_timeouts(self, timeout_s: float) -> None:
        """Set the timeout of every group; those of the mesh are made with torch's default."""
        self._timeout_s = timeout_s
        meshes = [mesh for mesh in (self._mesh, self._fsdp_mesh) if mesh is not None]
        mesh_groups = [group for mesh in meshes for group in mesh.get_all_groups()]
        default_group = dist.group.WORLD
        assert default_group is not None, "connect() made it"
        for group in {default_group, *mesh_groups, *self._groups.values()}:
            group.set_timeout(timedelta(seconds=timeout_s))

    # Mesh and groups

    @property
    def mesh(self) -> DeviceMesh:
        """The mesh of all ranks, with the axes pp, dp_replicate, dp_shard, cp, tp.

        Raises:
            RuntimeError: In a world of one, or before `launch`.
        """
        if self._mesh is None:
            raise RuntimeError(
                "a world of one process has no mesh; check world.is_distributed first"
                if not self.is_distributed
                else "there is no mesh before world.launch(), which trainer.configure() calls"
            )
        return self._mesh

    def get_mesh(self, *axes: str) -> DeviceMesh:
        """The submesh of some axes, in the mesh's order.

        Raises:
            ValueError: If there is no such axis.
            RuntimeError: As `mesh`.
        """
        ordered = ordered_axes(axes)
        return self.mesh[ordered] if len(ordered) > 1 else self.mesh[ordered[0]]

    @property
    def fsdp_mesh(self) -> DeviceMesh:
        """The submesh for `fully_shard`. Collective the first time.

        Raises:
            RuntimeError: As `mesh`.
        """
        if self._fsdp_mesh is None:
            self._fsdp_mesh = fsdp_mesh(self.mesh, self.shape)
            self._set_timeouts(self._timeout_s)
        return self._fsdp_mesh

    def group(self, kind: str = "control") -> ProcessGroup | None:
        """A CPU group of all ranks that callbacks may share; None in a world of one.

        Collective the first time for each kind: all ranks must call it, in the same order.
        Two threads must not use one group at the same time: give each thread its own kind.
        """
        if not self.is_distributed:
            return None
        if kind not in self._groups:
            self._refuse_if_guarded(f"group({kind!r})")
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self._timeout_s))
            self._groups[kind] = group
        return self._groups[kind]

    # Collectives

    def all_reduce(self, value: Any, op: ReduceOp = "mean") -> Any:
        """The value reduced over all ranks. Collective; doesn't change `value`.

        Args:
            value: A tensor (reduced on its device; of the same shape and dtype on all ranks), a
                number, or a dict of them.
            op: "mean", "sum", "min" or "max".

        Returns:
            The same kind as `value`, equal on all ranks; a mean of whole numbers is a float.

        Raises:
            ValueError: On all ranks, if keys or kinds of their dicts differ.
        """
        self._refuse_if_guarded("all_reduce")
        if isinstance(value, Mapping):
            self.agree(collectives.kinds(value), "what is reduced")
        return collectives.reduced(value, op, self._default_group)

    def all_gather(self, value: Any) -> Any:
        """The values of all ranks, by rank. Collective.

        Args:
            value: A tensor of the same shape and dtype on all ranks, or anything picklable: to
                gather tensors of any shape, pass `[tensor.cpu()]`.

        Returns:
            For a tensor, `(world_size, *shape)` on its device; for anything else, a list.

        Raises:
            ValueError: On all ranks, if shapes or dtypes differ; it shows them by rank.
        """
        self._refuse_if_guarded("all_gather")
        is_tensor = isinstance(value, Tensor)
        # NCCL and gloo would hang or abort the process.
        self.agree(collectives.kinds(value) if is_tensor else "an object", "what is gathered")
        return collectives.gathered(value, self._default_group, self.group())

    def broadcast(self, value: Tensor, src: int = 0) -> Tensor:
        """The tensor of rank `src`; other ranks pass one of its shape and dtype. Collective."""
        self._refuse_if_guarded("broadcast")
        result = value.detach().clone()
        if self.is_distributed:
            dist.broadcast(result, src)
        return result

    def broadcast_object(self, value: T, src: int = 0) -> T:
        """The picklable object of rank `src`. Collective."""
        self._refuse_if_guarded("broadcast_object")
        received: T = cpu_collectives.broadcast_object(value, src, self.group())
        return received

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self._refuse_if_guarded("barrier")
        if self.is_distributed:
            dist.barrier(group=self.group())

    def agree(self, value: T, what: str | None = None) -> T:
        """Check that all ranks have the same value. Collective.

        Ranks compare digests, in one exchange of 72 bytes, and the values only if these differ.

        Args:
            value: Compared by `==`; must be picklable. A mapping is compared entry by entry, unless
                `what` is given; its keys are the names in the error.
            what: The value's name in the error.

        Returns:
            The value.

        Raises:
            ValueError: On all ranks, if they differ; it shows the values by rank.
        """
        self._refuse_if_guarded("agree")
        if self.is_distributed:
            if what is None and isinstance(value, Mapping):
                Coordination(self).agree(value)
            else:
                Coordination(self).agree({what or "a value": value})
        return value

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any rank has, sorted. Collective.

        Ranks compare digests, in one exchange of 72 bytes, and send the names only if these differ.
        """
        self._refuse_if_guarded("union")
        return Coordination(self).union(names) if self.is_distributed else sorted(names)

    def each(self, function: Callable[[], T]) -> T:
        """Call a function on each rank and return what it returned on this one. Collective.

        An error of one rank is raised on all, so none waits for a rank that failed.
        `dream_trainer.world.Coordination` has more such methods, also for threads.

        Raises:
            RankFailure: On all ranks, if the function raised on any; the message names these
                ranks. In a world of one, the error itself is raised.
        """
        self._refuse_if_guarded("each")
        return Coordination(self).each(function) if self.is_distributed else function()

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 and return what it returned, on all ranks. Collective.

        Args:
            function: Its result must be picklable.

        Raises:
            RankFailure: On all ranks, if the function raised; in a world of one, the error itself
                is raised.
        """
        self._refuse_if_guarded("on_rank_zero")
        return Coordination(self).on_rank_zero(function) if self.is_distributed else function()

    def all_ranks(self, condition: bool | Tensor) -> bool:
        """Whether a condition holds on all ranks. Collective.

        Args:
            condition: A bool is reduced on the CPU, without device sync. A tensor, true if all its
                elements are, is reduced on its device, with a device sync.
        """
        self._refuse_if_guarded("all_ranks")
        if isinstance(condition, Tensor):
            return bool(collectives.reduced(condition.all(), "min", self._default_group))
        return cpu_collectives.is_true_on_all(condition, self.group())

    def any_rank(self, condition: bool | Tensor) -> bool:
        """Whether a condition holds on some rank. Collective.

        Args:
            condition: As for `all_ranks`.
        """
        self._refuse_if_guarded("any_rank")
        if isinstance(condition, Tensor):
            return bool(collectives.reduced(condition.all(), "max", self._default_group))
        return cpu_collectives.is_true_on_any(condition, self.group())

    @contextlib.contextmanager
    def no_collectives(
        self, where: str, advice: str = collective_guard.RANK_ZERO
    ) -> Iterator[None]:
        """Make collectives an error inside, including direct calls of torch.distributed.

        Args:
            where: Named in the error.
            advice: The reason, and what to do instead; the end of the error.
        """
        before, self._refusal = self._refusal, (where, advice)
        try:
            with collective_guard.CollectiveGuard(where, advice):
                yield
        finally:
            self._refusal = before

    def cleaning_up(self) -> contextlib.AbstractContextManager[None]:
        """The context of clean-up after an error: with several ranks, collectives are errors."""
        if not self.is_distributed:
            return contextlib.nullcontext()
        return self.no_collectives("the clean-up after an error", collective_guard.AFTER_ERROR)

    @property
    def _default_group(self) -> ProcessGroup | None:
        return dist.group.WORLD if self.is_distributed else None

    def _refuse_if_guarded(self, collective: str) -> None:
        if self._refusal is not None:
            raise RuntimeError(collective_guard.refusal(collective, *self._refusal))
