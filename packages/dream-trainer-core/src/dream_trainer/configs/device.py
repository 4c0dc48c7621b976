"""Device and layout: degrees of parallelism, precision, timeouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

import torch

from dream_trainer.configs.checked_fields import CheckedFields

Degree = int | Literal["auto"]
DeviceKind = Literal["auto", "cpu", "cuda", "xpu", "mps"]

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Axes of the device mesh, outermost first."""

_DEGREE_OF_AXIS = {
    "pp": "pipeline_parallel",
    "dp_replicate": "dp_replicate",
    "dp_shard": "dp_shard",
    "cp": "context_parallel",
    "tp": "tensor_parallel",
}


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh's axes, outermost first; their product is the world size."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def world_size(self) -> int:
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp)

    @property
    def dp_size(self) -> int:
        """Number of ranks that read different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def uses_fsdp(self) -> bool:
        """Whether FSDP shards the parameters and averages their gradients.

        Also for replicas with tensor or context parallelism, as shards of size 1: torch's
        composable DDP silently loses parameters that are DTensors.
        """
        return self.dp_shard > 1 or self.cp > 1 or (self.dp_replicate > 1 and self.tp > 1)

    @property
    def layout(self) -> str:
        """Name of the layout: "single", "ddp", "fsdp", "hsdp", "tp", "fsdp+tp", "cp", …"""
        names = []
        if self.dp_shard > 1:
            names.append("hsdp" if self.dp_replicate > 1 else "fsdp")
        elif self.dp_replicate > 1:
            names.append("ddp")
        names += [axis for axis in ("tp", "cp", "pp") if getattr(self, axis) > 1]
        return "+".join(names) or "single"


@dataclass(kw_only=True)
class DeviceParameters(CheckedFields):
    """Device, layout and precision.

    The default is one process, or DDP over the ranks that torchrun started. At most one degree
    may be "auto": the world size divided by the others. In one process every preset without a
    fixed degree above 1 means one device, so a script runs unchanged without torchrun.

    Args:
        device: "cpu", "cuda", "xpu", "mps", or "auto": the accelerator that torch finds, CUDA, XPU
            or MPS, else the CPU. MPS has no collectives, so it takes one process; with several,
            "auto" is the CPU there.
        dp_replicate: Replicas of the model, each on its own data (DDP).
        dp_shard: Shards of parameters, gradients and optimizer state (FSDP); HSDP with both.
        tensor_parallel: Ranks over which each layer's matrices are split.
        context_parallel: Ranks over which each sequence is split.
        pipeline_parallel: Stages of consecutive layers. The mesh has this axis, but the trainer
            raises for more than one stage.
        param_dtype: Gather parameters in this dtype (FSDP). Default: the model's dtype.
        autocast_dtype: Run steps inside torch.autocast with this dtype, in every layout; float16
            with a loss scale. Default: `param_dtype`. torch.float32: no autocast; FSDP then casts
            inputs of modules to `param_dtype`, and outputs and losses have it.
        reduce_dtype: Reduce gradients in this dtype (FSDP). Default: `param_dtype`.
        cpu_offload: Keep sharded parameters, gradients and optimizer state in host memory (FSDP);
            buffers stay on the device.
        reduce_every_batch: While gradients accumulate, reduce and shard those of each batch (FSDP),
            in place of those of the step with its last batch. Saves the memory of the unsharded
            gradients, for more communication.
        compile_model: Call `apply_compile`.
        checkpoint_activations: Call `apply_activation_checkpointing`.
        deterministic: Use only deterministic algorithms, for the rest of the process; an operation
            without one raises. Slower on CUDA.
        init_timeout_s: Timeout of collectives until the first step is done, in seconds.
        train_timeout_s: Timeout of collectives from then on, in seconds.
        cleanup_timeout_s: Seconds that callbacks may take to clean up after an error, with several
            ranks; then the process is ended.

    Raises:
        ValueError: If a degree, dtype or timeout is out of range, or two options exclude each
            other.
    """

    device: DeviceKind = "auto"

    dp_replicate: Degree = "auto"
    dp_shard: Degree = 1
    tensor_parallel: Degree = 1
    context_parallel: Degree = 1
    pipeline_parallel: Degree = 1

    param_dtype: torch.dtype | None = None
    autocast_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    cpu_offload: bool = False
    reduce_every_batch: bool = False
    compile_model: bool = False
    checkpoint_activations: bool = False

    deterministic: bool = False

    init_timeout_s: float = 600.0
    train_timeout_s: float = 300.0
    cleanup_timeout_s: float = 5.0

    def __post_init__(self) -> None:
        for name in _DEGREE_OF_AXIS.values():
            degree = getattr(self, name)
            is_count = isinstance(degree, int) and not isinstance(degree, bool) and degree >= 1
            if not is_count and degree != "auto":
                raise ValueError(
                    f'{name}={degree!r}: a whole number of at least 1 or "auto" is required'
                )
        if len(self._auto_degrees()) > 1:
            raise ValueError(
                f'{" and ".join(self._auto_degrees())} are both "auto"; '
                "give a number to all but one of them"
            )
        if self.device not in get_args(DeviceKind):
            raise ValueError(
                f'device={self.device!r}: "auto", "cpu", "cuda", "xpu" or "mps" is required; '
                "the index of a device is the local rank"
            )
        for name in ("param_dtype", "autocast_dtype", "reduce_dtype"):
            dtype = getattr(self, name)
            if dtype is not None and not (
                isinstance(dtype, torch.dtype) and dtype.is_floating_point
            ):
                raise ValueError(
                    f"{name}={dtype!r}: a floating point dtype is required, such as "
                    "torch.bfloat16, or None for the model's"
                )
        is_sharded = self.dp_shard != 1 or self.context_parallel != 1
        if self.param_dtype is not None and self.autocast_dtype is torch.float32:
            if not is_sharded and self.tensor_parallel == 1:
                raise ValueError(
                    f"param_dtype={self.param_dtype} and autocast_dtype=torch.float32 with "
                    "dp_shard=1: parameters are gathered in another dtype only where they are "
                    "sharded; leave out one of the two"
                )
        if self.reduce_every_batch and not is_sharded:
            raise ValueError(
                "reduce_every_batch=True with dp_shard=1: only gradients that will be sharded take "
                "less memory reduced; use DeviceParameters.FSDP(reduce_every_batch=True)"
            )
        for name in ("init_timeout_s", "train_timeout_s", "cleanup_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: seconds above 0 are required")
        if self.cpu_offload and not is_sharded:
            raise ValueError(
                "cpu_offload=True with dp_shard=1: only sharded parameters can be offloaded; "
                "use DeviceParameters.FSDP(cpu_offload=True)"
            )

    @classmethod
    def SINGLE_DEVICE(cls, **fields: Any) -> Self:
        """One process on one device."""
        return cls(**{"dp_replicate": 1, **fields})

    @classmethod
    def DDP(cls, **fields: Any) -> Self:
        """A replica of the model on each rank."""
        return cls(**{"dp_replicate": "auto", **fields})

    @classmethod
    def FSDP(cls, **fields: Any) -> Self:
        """Parameters, gradients and optimizer state sharded over all ranks."""
        return cls(**{"dp_replicate": 1, "dp_shard": "auto", **fields})

    @classmethod
    def HSDP(cls, *, dp_shard: int, **fields: Any) -> Self:
        """Sharded over groups of `dp_shard` ranks, replicated over the groups."""
        return cls(**{"dp_replicate": "auto", "dp_shard": dp_shard, **fields})

    def mesh_shape(self, world_size: int) -> MeshShape:
        """Sizes of the mesh's axes on `world_size` ranks.

        Raises:
            ValueError: If the product of the degrees can't be `world_size`.
        """
        degrees = {axis: getattr(self, name) for axis, name in _DEGREE_OF_AXIS.items()}
        fixed = {axis: degree for axis, degree in degrees.items() if degree != "auto"}
        product = math.prod(fixed.values())
        auto = self._auto_degrees()
        spelled = " × ".join(
            f"{_DEGREE_OF_AXIS[axis]}={degree}" for axis, degree in fixed.items() if degree != 1
        )
        spelled = spelled or "all are 1"
        if auto:
            if world_size % product:
                raise ValueError(
                    f"{world_size} ranks can't be divided by {product} ({spelled}), so there is "
                    f'no value for {auto[0]}="auto"; start a multiple of {product} ranks or '
                    "change the degrees"
                )
            degrees = {
                axis: world_size // product if degree == "auto" else degree
                for axis, degree in degrees.items()
            }
        elif product != world_size:
            started = "1 rank was" if world_size == 1 else f"{world_size} ranks were"
            raise ValueError(
                f"the degrees multiply to {product} ({spelled}), but {started} started; start "
                f"{product} ranks (torchrun --nproc-per-node={product}), or set one of the "
                'degrees to "auto"'
            )
        return MeshShape(**degrees)

    def num_ranks_to_start(self, num_devices: int) -> int:
        """Number of ranks that `@entrypoint` starts on one machine.

        One on the CPU; one per GPU if a degree is "auto"; else as many as the degrees multiply to,
        or one if there are fewer GPUs, which `mesh_shape` refuses.

        Args:
            num_devices: Number of visible GPUs.
        """
        if self.device == "cpu" or num_devices <= 1:
            return 1
        if self._auto_degrees():
            return num_devices
        product = math.prod(getattr(self, name) for name in _DEGREE_OF_AXIS.values())
        return product if product <= num_devices else 1

    @property
    def computes_in(self) -> torch.dtype | None:
        """Dtype of the autocast that steps run in; None without autocast."""
        dtype = self.autocast_dtype or self.param_dtype
        return None if dtype is torch.float32 else dtype

    def _auto_degrees(self) -> list[str]:
        return [name for name in _DEGREE_OF_AXIS.values() if getattr(self, name) == "auto"]
