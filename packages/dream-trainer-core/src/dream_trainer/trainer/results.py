"""What steps report: results in one form, and their mean over an epoch and over ranks."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dream_trainer.world.world import World

_FOLD_EVERY = 128
"""Batches whose scalars are kept before they are added up in one operation."""


def num_samples(batch: Any) -> int:
    """Number of samples in a batch: length of dimension 0 of the first tensor in it, else 1."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, (tuple, list)):
            batch = batch[0] if batch else None
        elif isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif dataclasses.is_dataclass(batch) and dataclasses.fields(batch):
            batch = getattr(batch, dataclasses.fields(batch)[0].name)
        else:
            return 1
    shape = batch.shape
    return shape[0] if shape else 1


class EpochMeans:
    """Sample-weighted means of the scalars that the batches of one epoch report.

    Adding costs no device operation: scalars are kept for some batches and then stacked and
    added up at once. Nothing else of a batch is kept, except other values of the last one.

    Args:
        step_name: Of the method whose results these are, for errors.
    """

    def __init__(self, step_name: str) -> None:
        self.step_name = step_name
        # Pending values by key; of a key whose values aren't scalars, the last one.
        self._columns: dict[str, list[Tensor | float] | deque[Any]] = {}
        self._pending_weights: list[int] = []
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, int] = {}
        self._last: dict[str, Any] = {}

    def add(self, result: Any, batch: Any) -> dict[str, Any]:
        """Take in what a step returned for a batch. No host synchronization.

        Returns:
            The result as a dict of detached values.

        Raises:
            TypeError: If it is neither a dict with string keys nor a tensor.
        """
        if type(result) is not dict:
            result = _as_dict(result, self.step_name)
        if result.keys() != self._columns.keys():
            self._begin_columns(result)
        detached = {}
        for key, value in result.items():
            if isinstance(value, Tensor) and value.requires_grad:
                value = value.detach()
            detached[key] = value
            self._columns[key].append(value)
        self._pending_weights.append(num_samples(batch))
        if len(self._pending_weights) == _FOLD_EVERY:
            self._fold()
        return detached

    def reduce(self, world: World) -> dict[str, Any]:
        """The means over all samples of all ranks; waits for the device. Collective.

        Args:
            world: Whose ranks took part. Ranks that read the same data count alike.

        Returns:
            A float for each scalar, in the order in which keys first came; of other values the
            last one.

        Raises:
            ValueError: On all ranks, if they report different keys.
        """
        self._fold()
        world.agree(sorted(self._sums), f"the scalars that {self.step_name} reports")
        if not self._sums:
            return dict(self._last)
        keys = sorted(self._sums)
        sums = torch.stack(
            [torch.as_tensor(self._sums[key], dtype=torch.float64).cpu() for key in keys]
        )
        weights = torch.tensor([self._weights[key] for key in keys], dtype=torch.float64)
        sums, weights = world.all_reduce(torch.stack([sums, weights]), "sum")
        means = dict(zip(keys, (sums / weights).tolist(), strict=True))
        return {key: means[key] for key in self._sums} | self._last

    def state_dict(self) -> dict[str, Any]:
        """What has been added so far on this rank; waits for the device."""
        self._fold()
        return {key: [float(self._sums[key]), self._weights[key]] for key in self._sums}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on adding from what `state_dict` returned."""
        self._columns, self._pending_weights, self._last = {}, [], {}
        self._sums = {key: total for key, (total, _) in state_dict.items()}
        self._weights = {key: weight for key, (_, weight) in state_dict.items()}

    def _begin_columns(self, result: dict[str, Any]) -> None:
        """Make room for the keys of a result, which aren't those of the one before it."""
        for key in result:
            if type(key) is not str:
                raise TypeError(
                    f"{self.step_name} returned a dict with the key {key!r}; keys are strings"
                )
        self._fold()
        self._columns = {
            key: [] if _is_scalar(value) else deque(maxlen=1) for key, value in result.items()
        }

    def _fold(self) -> None:
        """Add the pending scalars to the sums."""
        for key, column in self._columns.items():
            if not column:
                continue
            if isinstance(column, deque):
                self._last[key] = column[0]
                continue
            values = _stacked(key, column)
            weights = torch.tensor(self._pending_weights, dtype=torch.float64)
            self._sums[key] = self._sums.get(key, 0.0) + values @ weights.to(values.device)
            self._weights[key] = self._weights.get(key, 0) + sum(self._pending_weights)
            column.clear()
        self._pending_weights.clear()


def _as_dict(result: Any, step_name: str) -> dict[str, Any]:
    """What a step returned, if it isn't a dict itself."""
    if isinstance(result, Tensor):
        return {"loss": result}
    if isinstance(result, Mapping):
        return dict(result)
    raise TypeError(
        f"{step_name} returned {_described(result)}; return what it should report: a dict "
        'such as {"loss": loss}, or the loss as a tensor'
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def _stacked(key: str, column: Sequence[Tensor | float]) -> Tensor:
    """Scalars as one float64 vector, on the device that they are on."""
    try:
        tensors = [value for value in column if isinstance(value, Tensor)]
        if len(tensors) == len(column) and len({tensor.dim() for tensor in tensors}) == 1:
            return torch.stack(tensors).double().flatten()
        device = tensors[0].device if tensors else None
        numbers = [_as_float(value) if isinstance(value, int) else value for value in column]
        scalars = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in numbers]
        return torch.stack([scalar.reshape(()) for scalar in scalars])
    except (TypeError, RuntimeError) as error:
        raise TypeError(
            f"the step reports {key!r} as a single number in some batches and as something else "
            "in others; report one kind under one name"
        ) from error


def _as_float(value: int) -> float:
    """The number, or an infinite one if no float can hold it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__qualname__} ({value!r:.80})"
