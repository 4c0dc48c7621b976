"""The device of a rank: which one it is, and what is wrong if there is none."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_DEVICE_FILES = Path("/dev")


def device_of_rank(
    device: Literal["auto", "cpu", "cuda"], rank: int, local_rank: int
) -> torch.device:
    """The CPU, or the GPU with the index of the local rank. Warns once of a GPU that isn't used.

    A rank that sees a single GPU, as under `srun --gpus-per-task=1`, has that one.

    Args:
        device: As in DeviceParameters.
        rank: Rank 0 warns.
        local_rank: Index of the rank on its node.

    Raises:
        RuntimeError: If there is no such GPU.
    """
    if device == "cpu":
        return torch.device("cpu")
    if device == "auto" and not torch.cuda.is_available():
        if rank == 0 and _has_nvidia_gpu() and not _hides_gpus():
            _warn_once(
                f'device="auto" is the CPU, though this machine has an NVIDIA GPU: '
                f'{_why_there_is_none()}; set device="cpu" if the CPU is meant'
            )
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank < num_devices:
        return torch.device("cuda", local_rank)
    if num_devices == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return torch.device("cuda", 0)  # torchrun shows all ranks the same; `claim` checks others
    why = f" ({_why_there_is_none()})" if num_devices == 0 else ""
    raise RuntimeError(
        f"local rank {local_rank} has no CUDA device: {num_devices} are visible{why}; start at "
        'most as many ranks per node, or use DeviceParameters(device="cpu")'
    )


def claim(device: torch.device, rank: int, store: Store) -> None:
    """Check that no other rank has the same GPU; NCCL would fail or hang. Not collective.

    Raises:
        RuntimeError: If one has.
    """
    gpu = torch.cuda.get_device_properties(device).uuid
    owner = int(store.compare_set(f"gpu/{gpu}", "", str(rank)))
    if owner != rank:
        raise RuntimeError(
            f"ranks {owner} and {rank} both use GPU {gpu}; each needs its own: start at most as "
            "many ranks per node as it has GPUs, and set LOCAL_RANK for each (torchrun does), or "
            "let the launcher show each rank one GPU (srun --gpus-per-task=1)"
        )


def _has_nvidia_gpu() -> bool:
    return any(_DEVICE_FILES.glob("nvidia[0-9]*"))


def _hides_gpus() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _why_there_is_none() -> str:
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
