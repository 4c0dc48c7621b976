"""The scalars of results: picked out, reduced over ranks and read on the host, all at once."""

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


def scalars_of(result: Mapping[str, Any]) -> Scalars:
    """The single numbers among a step's result. No host synchronization."""
    return {key: value for key, value in result.items() if is_scalar(value)}


def is_scalar(value: Any) -> bool:
    """Whether a value is a real number, or a tensor with one."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def read(batches: Sequence[Scalars], device: torch.device) -> list[dict[str, float]]:
    """This rank's scalars as floats; waits for the device once, for all of them."""
    numbers = iter(_stacked(batches, device).tolist())
    return [{key: next(numbers) for key in sorted(batch)} for batch in batches]


class RankMeans:
    """Means of scalars over all ranks: one all-reduce of one vector, one copy to the host.

    Ranks needn't send each other their keys as long as these stay the same: whoever has others
    raises a flag in the vector, and all compare them.

    Args:
        what: Named in the error: who reports the scalars.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._keys: list[list[str]] | None = None

    def read(self, batches: Sequence[Scalars], world: World) -> list[dict[str, float]]:
        """The means as floats, for each batch. Collective; waits for the device.

        Raises:
            ValueError: On all ranks, if their keys differ; it shows who has which.
        """
        if not world.is_distributed:
            return read(batches, world.device)
        keys = [sorted(batch) for batch in batches]
        if self._keys is None:
            self._agree(keys, world)
        assert self._keys is not None
        values = _stacked(batches, world.device)
        if keys == self._keys:
            vector = torch.cat([values, values.new_zeros(1)])
        else:
            vector = values.new_zeros(sum(map(len, self._keys)) + 1)
            vector[-1] = 1.0
        *numbers, differs = world.all_reduce(vector, "mean").tolist()
        if differs:
            self._agree(keys, world)
            numbers = world.all_reduce(values, "mean").tolist()
        iterator = iter(numbers)
        return [{key: next(iterator) for key in batch} for batch in keys]

    def _agree(self, keys: list[list[str]], world: World) -> None:
        self._keys = None
        world.agree(keys[0] if len(keys) == 1 else keys, f"the scalars that {self._what} reports")
        self._keys = keys


def mean_over_batches(batches: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each key the mean over the batches that report it."""
    keys = dict.fromkeys(key for batch in batches for key in batch)
    columns = {key: [batch[key] for batch in batches if key in batch] for key in keys}
    return {key: sum(column) / len(column) for key, column in columns.items()}


def _stacked(batches: Sequence[Scalars], device: torch.device) -> Tensor:
    """The scalars of all batches, each in the order of its keys, as a float64 vector."""
    values = [batch[key] for batch in batches for key in sorted(batch)]
    if not values:
        return torch.zeros(0, dtype=torch.float64, device=device)
    others = [as_number(value) for value in values if not isinstance(value, Tensor)]
    on_device = iter(torch.tensor(others, dtype=torch.float64).to(device).unbind())
    return torch.stack(
        [
            _whole(value).to(device, torch.float64).reshape(())
            if isinstance(value, Tensor)
            else next(on_device)
            for value in values
        ]
    )


def _whole(value: Tensor) -> Tensor:
    """The value of a tensor that may be spread over ranks."""
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.5 s
    if distributed is not None and isinstance(value, distributed.DTensor):
        value = value.full_tensor()
    return value.detach()
