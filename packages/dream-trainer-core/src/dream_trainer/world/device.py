"""The device of a rank: which one it is, and what is wrong if there is none."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
import torch.distributed as dist

from dream_trainer.configs.device import DeviceKind

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_DEVICE_FILES = Path("/dev")


def device_of_rank(
    device: DeviceKind, rank: int, local_rank: int, world_size: int = 1
) -> torch.device:
    """The CPU, or the accelerator with the index of the local rank.

    A rank that sees a single one, as under `srun --gpus-per-task=1`, has that one. Warns once of
    one that isn't used.

    Args:
        device: As in DeviceParameters.
        rank: Rank 0 warns.
        local_rank: Index of the rank on its node.
        world_size: Number of ranks: MPS takes one.

    Raises:
        RuntimeError: If there is no such device.
    """
    if device == "cpu":
        return torch.device("cpu")
    found = _accelerator()
    if found == "mps" and world_size > 1:
        if device == "mps":
            raise RuntimeError(
                f'device="mps" with {world_size} ranks: MPS has no collectives; start one process, '
                'or use DeviceParameters(device="cpu")'
            )
        found = None
        if rank == 0:
            _warn_once(f'device="auto" is the CPU for {world_size} ranks: MPS has no collectives')
    if device == "auto" and found is None:
        if rank == 0 and _has_nvidia_gpu() and not _hides_gpus():
            _warn_once(
                f'device="auto" is the CPU, though this machine has an NVIDIA GPU: '
                f'{_why_there_is_none("cuda")}; set device="cpu" if the CPU is meant'
            )
        return torch.device("cpu")
    kind = found if device == "auto" and found is not None else device
    count = num_devices() if kind == found else 0
    if local_rank < count:
        return torch.device(kind, local_rank)
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device(kind, 0)  # torchrun shows all ranks the same; `claim` checks others
    why = f" ({_why_there_is_none(kind)})" if count == 0 else ""
    raise RuntimeError(
        f"local rank {local_rank} has no {kind.upper()} device: {count} are visible{why}; start at "
        'most as many ranks per node, or use DeviceParameters(device="cpu")'
    )


def num_devices() -> int:
    """Number of accelerators that this process sees, of a kind that is supported."""
    return 0 if _accelerator() is None else torch.accelerator.device_count()


def backends(device: torch.device) -> str:
    """Backends of a process group: gloo for CPU tensors, the device's own for others."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def claim(device: torch.device, rank: int, store: Store) -> None:
    """Check that no other rank has the same GPU; NCCL would fail or hang. Not collective.

    Raises:
        RuntimeError: If one has.
    """
    properties = torch.get_device_module(device).get_device_properties(device)
    gpu = getattr(properties, "uuid", None)
    if gpu is None:  # a driver of XPU that doesn't know it
        return
    owner = int(store.compare_set(f"gpu/{gpu}", "", str(rank)))
    if owner != rank:
        raise RuntimeError(
            f"ranks {owner} and {rank} both use GPU {gpu}; each needs its own: start at most as "
            "many ranks per node as it has GPUs, and set LOCAL_RANK for each (torchrun does), or "
            "let the launcher show each rank one GPU (srun --gpus-per-task=1)"
        )


def _accelerator() -> str | None:
    """Kind of the accelerator that torch finds; None if there is none, or it isn't supported."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None and found.type in get_args(DeviceKind) else None


def _has_nvidia_gpu() -> bool:
    return any(_DEVICE_FILES.glob("nvidia[0-9]*"))


def _hides_gpus() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _why_there_is_none(kind: str) -> str:
    if kind != "cuda":
        return f"torch {torch.__version__} finds none"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if _hides_gpus():
        return "CUDA_VISIBLE_DEVICES hides them"
    if not _has_nvidia_gpu():
        return "this machine shows no NVIDIA GPU"
    return f"its driver doesn't run CUDA {torch.version.cuda}, which torch needs; see nvidia-smi"


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)
