"""All private names of torch that this package uses, each behind a function that says what for.

None has a public counterpart in torch 2.11 to 2.13. `tests/test_torch_private.py` tests each, so a
torch that renames or changes one fails there first.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

FAKE_BACKEND = "fake"

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)
"""Attributes in which a module keeps its hooks."""

# Meshes and layouts


def flattened_mesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """The mesh with all its axes flattened into one. Collective: it makes a process group."""
    return mesh._flatten(axis)  # noqa: SLF001


def concatenated_mesh(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """A mesh with the axes of several submeshes of one mesh."""
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh._concatenate(list(meshes))  # noqa: SLF001


def begin_reduction(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Make DDP reduce the gradients of the next backward, without a forward of its module."""
    ddp._pre_forward()  # noqa: SLF001
    ddp._post_forward(None)  # noqa: SLF001


def missing_gradients(ddp: nn.parallel.DistributedDataParallel) -> list[int]:
    """Indices of parameters that the last backward didn't reach, while DDP waits for them.

    Empty if the reduction is complete, or hasn't begun since it reached none.
    """
    try:
        ddp._check_reducer_finalized()  # noqa: SLF001
    except RuntimeError as error:
        listed = re.search(r"indices which did not receive grad for rank \d+:([\d ]+)", str(error))
        if listed is None:
            raise
        return [int(index) for index in listed[1].split()]
    return []


def end_reductions(ddp: nn.parallel.DistributedDataParallel) -> None:
    """Remove DDP's hooks from its parameters; it can't be used any more."""
    ddp._remove_autograd_hooks()  # noqa: SLF001


def is_in_fsdp_forward(module: nn.Module) -> bool:
    """Whether an FSDP module runs its forward, or a method registered as one."""
    state: Any = module._get_fsdp_state()  # type: ignore[operator]  # noqa: SLF001
    return bool(state._training_state.name == "FORWARD")  # noqa: SLF001


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names that torch.distributed.checkpoint gives them, in any wrapper."""
    from torch.distributed.checkpoint.state_dict import _get_fqns

    for key, parameter in model.named_parameters():
        (name,) = _get_fqns(model, key)
        yield name, parameter


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP shards, with the model itself."""
    if "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the parameters that FSDP has gathered for a forward."""
    for module in fsdp_modules(model):
        module.reshard()


def drop_unsharded_gradients(model: nn.Module) -> None:
    """Drop gradients that FSDP has accumulated and not reduced."""
    for group in _fsdp_groups(model):
        group._partial_reduce_output = None  # noqa: SLF001
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if (unsharded := getattr(parameter, "_unsharded_param", None)) is not None:
                unsharded.grad = None


def initialize_frozen_groups(model: nn.Module) -> None:
    """Let FSDP reduce gradients of parameters that are frozen now, in the policy's dtypes.

    At its first forward, FSDP takes dtypes from the parameters that require gradients then. Call it
    once parameters have their memory.
    """
    for module in fsdp_modules(model):
        module._get_fsdp_state()._lazy_init()  # noqa: SLF001
    for group in _fsdp_groups(model):
        if group._orig_dtype is None and group.fsdp_params:  # noqa: SLF001
            group._orig_dtype = group.fsdp_params[0].orig_dtype  # noqa: SLF001
            group._reduce_dtype = group.fsdp_params[0].reduce_dtype  # noqa: SLF001


def unreduced_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Sharded parameters for which FSDP has accumulated gradients and not reduced them."""
    return [
        parameter.sharded_param
        for group in _fsdp_groups(model)
        for parameter in group.fsdp_params
        if group._partial_reduce_output is not None  # noqa: SLF001
        or parameter.unsharded_accumulated_grad is not None
        or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
    ]


def _fsdp_groups(model: nn.Module) -> Iterator[Any]:
    for module in fsdp_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group  # noqa: SLF001
        if group is not None:
            yield group


def checkpoint_activations(module: nn.Module) -> None:
    """Recompute a module's activations in backward. Unlike a wrapper, keeps parameter names."""
    from torch.distributed._composable.checkpoint_activation import checkpoint

    checkpoint(module)


def seed_sharded_random(seed: int, mesh: DeviceMesh) -> None:
    """Seed random operations on CUDA DTensors; the first one would broadcast rank 0's state."""
    from torch.distributed.tensor._random import manual_seed

    manual_seed(seed, mesh)


# Schedulers


def has_scheduler(optimizer: Optimizer) -> bool:
    """Whether one of torch's schedulers was made of an optimizer; not ReduceLROnPlateau."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


# Many tensors in one operation, on one device and of one dtype


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place by a scalar."""
    torch._foreach_mul_(tensors, factor)


def clamp(tensors: list[Tensor], limit: float) -> None:
    """Clamp each element of tensors in place to [-limit, limit]."""
    torch._foreach_clamp_min_(tensors, -limit)
    torch._foreach_clamp_max_(tensors, limit)


def unscale(tensors: list[Tensor], overflow: Tensor, inverse_scale: Tensor) -> None:
    """Multiply tensors in place; set `overflow` to 1 if one isn't finite."""
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, overflow, inverse_scale)


def update_scale(
    scale: Tensor,
    growth_tracker: Tensor,
    overflow: Tensor,
    growth: float,
    backoff: float,
    interval: int,
) -> None:
    """Adapt a loss scale in place, as torch.amp.GradScaler does."""
    torch._amp_update_scale_(scale, growth_tracker, overflow, growth, backoff, interval)


# Compiled code


def is_compiled(function: Callable[..., Any]) -> bool:
    """Whether a function or method is what `torch.compile` returned."""
    return getattr(function, "_torchdynamo_orig_callable", None) is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that `torch.compile(module)` was made of; a module that it didn't make, itself."""
    return getattr(module, "_orig_mod", module)


def mark_cudagraph_step() -> None:
    """Tell CUDA graphs that outputs of earlier steps may be overwritten, if there can be graphs.

    Without the mark, torch guesses: with several forwards in a step it overwrites the outputs of
    the first. Does nothing before the module that makes the graphs is loaded, since torch's
    function would load it, with the compiler.
    """
    if "torch._inductor.cudagraph_trees" in sys.modules:
        torch.compiler.cudagraph_mark_step_begin()


# NCCL


def nccl_backends() -> list[tuple[str, Any]]:
    """The NCCL backends of this process's groups, each after a description of its group."""
    if not dist.is_nccl_available():
        return []
    backends = []
    for group in list(distributed_c10d._world.pg_map):  # noqa: SLF001
        if torch.device("cuda") in group._device_types:  # noqa: SLF001
            backend: Any = group._get_backend(torch.device("cuda"))  # noqa: SLF001
            backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
            if isinstance(backend, dist.ProcessGroupNCCL):
                backends.append((group.group_desc, backend))
    return backends


def nccl_error(backend: Any) -> str:
    """Name of the ErrorType that the watchdog of an NCCL backend has found; or SUCCESS."""
    name: str = backend.get_error().name
    return name


def flight_recorder_file(rank: int) -> Path:
    """Where torch's flight recorder writes the last collectives of a rank after a failure."""
    cache = os.environ.get("XDG_CACHE_HOME") or f"{os.environ.get('HOME', '/tmp')}/.cache"
    prefix = (
        os.environ.get("TORCH_FR_DUMP_TEMP_FILE")
        or os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
        or f"{cache}/torch/comm_lib_trace_rank_"
    )
    return Path(f"{prefix}{rank}")


# Simulated ranks


def init_fake_process_group(rank: int, world_size: int) -> None:
    """Make torch's fake process group, a part of its tests, the default one."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(FAKE_BACKEND, rank=rank, world_size=world_size, store=FakeStore())


def clear_sharding_caches() -> None:
    """Empty torch's caches of DTensor shardings, which don't tell ranks apart.

    Their keys are meshes, and the meshes of two ranks are equal: a DTensor of the second rank would
    get the shard of the first.
    """
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute._gen_transform_infos.cache_clear()  # noqa: SLF001


# Loaders and groups


def has_running_workers(loader: Any) -> bool:
    """Whether a DataLoader with `persistent_workers` has started them."""
    return getattr(loader, "_iterator", None) is not None


@contextlib.contextmanager
def before_group_creation(call: Callable[[], None]) -> Iterator[None]:
    """Inside, `call` is called when this thread makes a process group, and may raise.

    The only place that replaces a function of torch: the one that names groups, which `new_group`,
    `split_group` and `init_device_mesh` all call before they wait for other ranks. They wait in
    C++, where no dispatch mode sees it.
    """
    name_group, thread = distributed_c10d._process_group_name, threading.get_ident()  # noqa: SLF001

    def call_and_name(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            call()
        return name_group(*args, **kwargs)

    distributed_c10d._process_group_name = call_and_name  # noqa: SLF001
    try:
        yield
    finally:
        distributed_c10d._process_group_name = name_group  # noqa: SLF001
