"""StagingMemory: host memory for the copies of a save, pinned where they come from a GPU."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

K = TypeVar("K", bound=Hashable)

_ALIGNMENT = 64
"""Bytes; a cache line, and enough for every dtype."""

_PORTABLE = 1  # cudaHostRegisterPortable


class StagingMemory(Generic[K]):
    """Host tensors for copies of others, reused as long as their shapes and dtypes are the same.

    Copies of CUDA tensors lie in one pinned block, so that a GPU writes to them without blocking
    the host. It has their exact size: torch's `pin_memory` rounds each tensor up to a power of two,
    and keeps the memory for ever.
    """

    def __init__(self) -> None:
        self._tensors: dict[K, Tensor] = {}
        self._block: PinnedBlock | None = None

    def copies_of(self, originals: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """Contiguous host tensors with the shapes and dtypes of others, without their values.

        Invalidates the tensors of the call before.

        Raises:
            RuntimeError: If the host has too little memory to pin.
        """
        on_gpu = {key: t for key, t in originals.items() if t.device.type == "cuda"}
        kept = {k: t for k, t in self._tensors.items() if _fits(t, originals.get(k))}
        if self._block is None or any(key not in kept for key in on_gpu):
            self.release()
            kept = {key: tensor for key, tensor in kept.items() if key not in on_gpu}
            if on_gpu:
                self._block = PinnedBlock(sum(_aligned(t.nbytes) for t in on_gpu.values()))
                kept |= _carved(self._block, on_gpu)
        self._tensors = {
            key: kept[key] if key in kept else torch.empty(original.shape, dtype=original.dtype)
            for key, original in originals.items()
        }
        return self._tensors

    def release(self) -> None:
        """Give the memory back. Nothing may be copied to it any more."""
        self._tensors = {}
        if self._block is not None:
            self._block.unpin()
            self._block = None


class PinnedBlock:
    """Page-locked host memory of an exact size. Needs CUDA.

    Args:
        num_bytes: Its size.

    Raises:
        RuntimeError: If the host has too little memory to pin.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, max(num_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_DONTFORK"):
            # Otherwise each loader worker that is forked gets a copy: pinned pages can't be shared.
            self.memory.madvise(mmap.MADV_DONTFORK)
        self._address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
        status = int(torch.cuda.cudart().cudaHostRegister(self._address, num_bytes, _PORTABLE))
        if status:
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # CUDA keeps the error; the next launch raises it
            raise RuntimeError(
                f"{num_bytes / 1e9:.1f} GB of host memory can't be pinned for a copy of this "
                f"rank's state (CUDA error {status}); free host memory, or use CheckpointCallback, "
                "which needs no copy"
            )

    def unpin(self) -> None:
        """Unlock the pages; the memory remains as long as a tensor uses it."""
        torch.cuda.cudart().cudaHostUnregister(self._address)


def _carved(block: PinnedBlock, originals: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Tensors in a block, each with a storage of its own: torch.save writes whole storages."""
    tensors, offset = {}, 0
    for key, original in originals.items():
        num_bytes = original.nbytes
        if num_bytes:
            content = torch.frombuffer(
                block.memory, dtype=torch.uint8, count=num_bytes, offset=offset
            )
            tensors[key] = content.view(original.dtype).view(original.shape)
        else:
            tensors[key] = torch.empty(original.shape, dtype=original.dtype)
        offset += _aligned(num_bytes)
    return tensors


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / _ALIGNMENT) * _ALIGNMENT


def _fits(tensor: Tensor, original: Tensor | None) -> bool:
    return (
        original is not None and tensor.shape == original.shape and tensor.dtype == original.dtype
    )
