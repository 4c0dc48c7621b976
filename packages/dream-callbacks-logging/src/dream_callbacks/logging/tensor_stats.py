"""Norms and histograms of tensors that may be sharded over ranks, without a host sync.

A rank holds a whole tensor or a shard, and other ranks may hold replicas of it. Each rank
contributes its values divided by the number of replicas, so a sum over all ranks is correct in
every layout: one collective for all tensors, whatever their meshes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dream_callbacks.logging.sinks.base import Histogram
from dream_trainer.numbers import exact_dtype
from dream_trainer.world import World

NUM_BINS = 64
_MAX_SAMPLES = 2**20
"""Maximum number of values per rank and tensor in a histogram; larger shards are subsampled."""


@dataclass(frozen=True)
class TensorStats:
    """Statistics of several tensors, still on the device.

    Args:
        sums: Float64 `(tensors, 3)`: sum of squares, sum, number of values.
        bounds: Float64 `(tensors, 2)`: smallest and largest finite value.
        counts: Float64 `(tensors, bins)`; None without histograms.
    """

    sums: Tensor
    bounds: Tensor
    counts: Tensor | None

    def norms(self) -> list[float | None]:
        """L2 norms; None for tensors without values. One device sync."""
        sums = self.sums.tolist()
        return [squares**0.5 if num_values else None for squares, _, num_values in sums]

    def histograms(self) -> list[Histogram | None]:
        """Histograms of the finite values; None if there are none. Device syncs."""
        if self.counts is None:
            return [None] * len(self.sums)
        rows = zip(self.counts.tolist(), self.bounds.tolist(), self.sums.tolist(), strict=True)
        return [
            Histogram(
                counts=counts,
                edges=torch.linspace(low, high, NUM_BINS + 1, dtype=torch.float64).tolist(),
                total=total,
                total_of_squares=squares,
            )
            if num_values and low < high
            else None
            for counts, (low, high), (squares, total, num_values) in rows
        ]


def tensor_stats(
    tensors: Sequence[Tensor | None], world: World, *, with_histograms: bool
) -> TensorStats:
    """Norms, sums and histograms of tensors. No host synchronization.

    Collective: all ranks call it for the same tensors, each with its shards. Two collectives,
    three with histograms.

    Args:
        tensors: None counts as a tensor without values.
        world: The ranks that hold the tensors.
        with_histograms: Whether to count values in bins.
    """
    parts = [_local_values(tensor, world) for tensor in tensors]
    sums = world.all_reduce(torch.stack([_sums(*part, world.device) for part in parts]), "sum")
    bounds = torch.stack([_bounds(tensor, world.device) for tensor, _ in parts])
    bounds = _low_negated(world.all_reduce(_low_negated(bounds), "max"))
    counts = None
    if with_histograms:
        rows = [
            _bin_counts(tensor, num_copies, low_and_high)
            for (tensor, num_copies), low_and_high in zip(parts, bounds, strict=True)
        ]
        counts = world.all_reduce(torch.stack(rows), "sum")
    return TensorStats(sums, bounds, counts)


def _local_values(tensor: Tensor | None, world: World) -> tuple[Tensor, int]:
    """This rank's values of a tensor, flattened, and the number of replicas of them."""
    if tensor is None:
        return torch.empty(0, device=world.device), world.world_size
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.5 s
    if distributed is None or not isinstance(tensor, distributed.DTensor):
        if tensor.layout is not torch.strided:
            tensor = tensor.coalesce().values()  # implicit zeros don't count
        return tensor.detach().flatten(), world.world_size
    if any(placement.is_partial() for placement in tensor.placements):
        whole = tensor.full_tensor()
        return whole.detach().flatten(), world.world_size
    num_parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        num_parts *= 1 if placement.is_replicate() else size
    return tensor.to_local().detach().flatten(), world.world_size // num_parts


def _sums(values: Tensor, num_copies: int, device: torch.device) -> Tensor:
    exact = exact_dtype(values.device)  # a float32 norm over millions of values is off by 3e-5
    squares = torch.linalg.vector_norm(values, dtype=exact).square()
    num_values = torch.full_like(squares, values.numel())
    sums = torch.stack([squares, values.sum(dtype=exact), num_values])
    return sums.to(device) / num_copies


def _bounds(values: Tensor, device: torch.device) -> Tensor:
    if values.numel() == 0:  # filled on the device, since a copy to it would wait for it
        bounds = (torch.inf, -torch.inf)
        return torch.stack(
            [torch.full((), x, dtype=exact_dtype(device), device=device) for x in bounds]
        )
    is_finite = values.isfinite()
    low = torch.where(is_finite, values, torch.inf).amin()
    high = torch.where(is_finite, values, -torch.inf).amax()
    return torch.stack([low, high]).to(device, exact_dtype(device))


def _low_negated(bounds: Tensor) -> Tensor:
    """With the lower bounds negated, one "max" reduces both; negating again restores them."""
    low, high = bounds.unbind(1)
    return torch.stack([-low, high], dim=1)


def _bin_counts(values: Tensor, num_copies: int, bounds: Tensor) -> Tensor:
    counts = torch.zeros(NUM_BINS, dtype=bounds.dtype, device=bounds.device)
    if values.numel() == 0:
        return counts
    stride = -(-values.numel() // _MAX_SAMPLES)
    sample = values if stride == 1 else values[::stride]
    sample = sample.to(bounds.device, bounds.dtype)
    weight = values.numel() / sample.numel() / num_copies
    low, high = bounds
    bins = (sample - low) / (high - low) * NUM_BINS
    is_finite = bins.isfinite()
    bins = torch.where(is_finite, bins, 0.0).clamp(0, NUM_BINS - 1).long()
    # Not histc or bincount: histc rejects NaN, bincount syncs with the device.
    return counts.scatter_add_(0, bins, is_finite.to(bounds.dtype) * weight)
