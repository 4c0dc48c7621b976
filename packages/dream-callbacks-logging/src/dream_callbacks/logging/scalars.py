"""Scalars of results: selected, averaged over ranks and copied to the host in one transfer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dream_trainer.numbers import as_number, exact_dtype, to_float
from dream_trainer.trainer.results import weights_of
from dream_trainer.world import World

Number = Tensor | float


@dataclass(frozen=True, slots=True)
class Scalars:
    """The scalars of a step's result.

    Attributes:
        values: Plain numbers, or tensors with one element, by key.
        weights: Weights of those that have their own; the others have 1.
    """

    values: Mapping[str, Number]
    weights: Mapping[str, Number]


def select_scalars(result: Mapping[str, Any]) -> Scalars:
    """Select the scalars of a result. No host synchronization."""
    numbers = ((key, as_number(value)) for key, value in result.items())
    values = {key: number for key, number in numbers if number is not None}
    weights = weights_of(result)
    return Scalars(values, {key: weights[key] for key in weights if key in values})


def to_floats(values: Mapping[str, Number], device: torch.device) -> dict[str, float]:
    """This rank's scalars as floats, sorted by key, with one device sync for all of them."""
    keys = sorted(values)
    return dict(zip(keys, _stack([values[key] for key in keys], device).tolist(), strict=True))


class RankMeans:
    """Means of scalars over batches and ranks: one all-reduce of one vector, one copy to the host.

    A scalar is averaged over the batches and ranks that report it. Ranks exchange their keys only
    when there are new ones: a rank with a new key sets a flag in the vector, and then all ranks
    exchange them and reduce again.
    """

    def __init__(self) -> None:
        self._keys: list[str] | None = None

    def read(self, batches: Sequence[Scalars], world: World) -> dict[str, float]:
        """The means as floats, by key. Collective; one device sync."""
        if not world.is_distributed:
            return means_of_rank(batches, world.device)
        own = {key for batch in batches for key in batch.values}
        if self._keys is None:
            self._keys = world.union(own)
        has_new = not own.issubset(self._keys)
        *sums, num_ranks_with_new = self._reduced(batches, has_new, world)
        if num_ranks_with_new:
            self._keys = world.union(own.union(self._keys))
            *sums, _ = self._reduced(batches, False, world)
        return _means(self._keys, sums)

    def _reduced(self, batches: Sequence[Scalars], has_new: bool, world: World) -> list[float]:
        """The sums over ranks, and the number of ranks with new keys."""
        assert self._keys is not None
        sums = _sums(batches, self._keys, world.device)
        vector = torch.cat([sums, sums.new_full((1,), has_new)])
        numbers: list[float] = world.all_reduce(vector, "sum").tolist()
        return numbers


def means_of_rank(batches: Sequence[Scalars], device: torch.device) -> dict[str, float]:
    """The means over this rank's batches as floats; one device sync."""
    if len(batches) == 1 and not batches[0].weights:
        return to_floats(batches[0].values, device)
    keys = sorted({key for batch in batches for key in batch.values})
    return _means(keys, _sums(batches, keys, device).tolist())


def _sums(batches: Sequence[Scalars], keys: Sequence[str], device: torch.device) -> Tensor:
    """Sums over batches of value times weight, then of weights, `(2 * keys,)`."""
    values = _stack([b.values.get(key, 0.0) for b in batches for key in keys], device)
    weights = _stack(
        [b.weights.get(key, 1.0 if key in b.values else 0.0) for b in batches for key in keys],
        device,
    )
    if any(batch.weights for batch in batches):
        values = torch.where(weights == 0, 0.0, values * weights)  # NaN may have weight 0
    sums = torch.cat([values, weights])
    return sums.view(2, len(batches), len(keys)).sum(1).flatten() if len(batches) > 1 else sums


def _means(keys: Sequence[str], sums: Sequence[float]) -> dict[str, float]:
    """Means of those keys that some batch reported, from `_sums`."""
    totals, weights = sums[: len(keys)], sums[len(keys) :]
    return {
        key: total / weight
        for key, total, weight in zip(keys, totals, weights, strict=True)
        if weight
    }


def _stack(values: Sequence[Number], device: torch.device) -> Tensor:
    """Numbers as a vector, in `exact_dtype`."""
    if not values:
        return torch.zeros(0, dtype=exact_dtype(device), device=device)
    others = [to_float(value) for value in values if not isinstance(value, Tensor)]
    numbers = torch.tensor(others, dtype=exact_dtype(device)).to(device, non_blocking=True)
    if len(others) == len(values):
        return numbers
    on_device = iter(numbers.unbind())
    return torch.stack(
        [
            value.to(device, exact_dtype(device)).reshape(())
            if isinstance(value, Tensor)
            else next(on_device)
            for value in values
        ]
    )
