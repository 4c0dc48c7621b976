"""Scalars of results: selected, reduced over ranks and copied to the host in one transfer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from dream_callbacks.logging.to_jsonable import as_number
from dream_trainer.world import World

Scalars = dict[str, Tensor | float]


def select_scalars(result: Mapping[str, Any]) -> Scalars:
    """Select the scalars of a step's result. No host synchronization."""
    return {key: value for key, value in result.items() if is_scalar(value)}


def is_scalar(value: Any) -> bool:
    """Whether a value is a real number or a real tensor with one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def to_floats(batches: Sequence[Scalars], device: torch.device) -> list[dict[str, float]]:
    """This rank's scalars as floats, with one device sync for all of them."""
    numbers = iter(_stack(batches, device).tolist())
    return [{key: next(numbers) for key in sorted(batch)} for batch in batches]


class RankMeans:
    """Means of scalars over all ranks: one all-reduce of one vector, one copy to the host.

    Ranks compare their keys only when these change: a rank whose keys changed sets a flag in the
    vector, and then all ranks compare.

    Args:
        what: Method that reports the scalars, for the error message.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._keys: list[list[str]] | None = None

    def read(self, batches: Sequence[Scalars], world: World) -> list[dict[str, float]]:
        """The means as floats, for each batch. Collective; one device sync.

        Raises:
            ValueError: On all ranks, if their keys differ; the message lists the keys by rank.
        """
        if not world.is_distributed:
            return to_floats(batches, world.device)
        keys = [sorted(batch) for batch in batches]
        if self._keys is None:
            self._agree_on_keys(keys, world)
        assert self._keys is not None
        values = _stack(batches, world.device)
        if keys == self._keys:
            vector = torch.cat([values, values.new_zeros(1)])
        else:
            vector = values.new_zeros(sum(map(len, self._keys)) + 1)
            vector[-1] = 1.0
        *numbers, differs = world.all_reduce(vector, "mean").tolist()
        if differs:
            self._agree_on_keys(keys, world)
            numbers = world.all_reduce(values, "mean").tolist()
        iterator = iter(numbers)
        return [{key: next(iterator) for key in batch} for batch in keys]

    def _agree_on_keys(self, keys: list[list[str]], world: World) -> None:
        self._keys = None
        world.agree(keys[0] if len(keys) == 1 else keys, f"the scalars that {self._what} reports")
        self._keys = keys


def mean_over_batches(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each key, the mean over the batches that contain it."""
    keys = dict.fromkeys(key for batch in batches for key in batch)
    columns = {key: [batch[key] for batch in batches if key in batch] for key in keys}
    return {key: sum(column) / len(column) for key, column in columns.items()}


def _stack(batches: Sequence[Scalars], device: torch.device) -> Tensor:
    """The scalars of all batches, sorted by key within each, as a float64 vector."""
    values = [batch[key] for batch in batches for key in sorted(batch)]
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    others = [as_number(value) for value in values if not isinstance(value, Tensor)]
    numbers = torch.tensor(others, dtype=torch.float64).to(device, non_blocking=True)
    on_device = iter(numbers.unbind())
    return torch.stack(
        [
            _full_tensor(value).to(device, torch.float64).reshape(())
            if isinstance(value, Tensor)
            else next(on_device)
            for value in values
        ]
    )


def _full_tensor(value: Tensor) -> Tensor:
    """The full value of a tensor that may be a DTensor, detached."""
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.5 s
    if distributed is not None and isinstance(value, distributed.DTensor):
        value = value.full_tensor()
    return value.detach()
