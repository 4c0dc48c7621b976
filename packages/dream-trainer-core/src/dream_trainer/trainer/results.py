"""Results of steps, and their means over an epoch and over ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dream_trainer.world.world import World

_FOLD_EVERY = 128
"""Batches whose scalars are buffered before they are summed in one operation."""


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

    A scalar is copied when it is added, on its device, since its memory may change afterwards: that
    of a parameter with the next step, that of a CUDA graph's output with the next replay. Copies
    are buffered, and summed some batches later in one operation per key. Of values that aren't
    scalars, the last batch's are kept, without a copy.

    Args:
        step_name: Name of the method whose results these are, for errors.
    """

    def __init__(self, step_name: str) -> None:
        self.step_name = step_name
        self._columns: dict[str, _WeightedSum | _LastValue] = {}

    def add(self, result: Any, batch: Any) -> dict[str, Any]:
        """Add the result of a step. No host synchronization.

        Returns:
            The result as a dict of detached values; scalars are copies that nothing overwrites.

        Raises:
            TypeError: If it is neither a dict with string keys nor a tensor, or a key that was
                reported as a scalar isn't one now.
        """
        if type(result) is not dict:
            result = _as_dict(result, self.step_name)
        weight = num_samples(batch)
        report = {}
        for key, value in result.items():
            column = self._columns.get(key)
            if column is None:
                column = self._columns[key] = self._new_column(key, value)
            report[key] = column.add(value, weight)
        return report

    def reduce(self, world: World) -> dict[str, Any]:
        """The means over all samples of all ranks. Collective; synchronizes with the device.

        Args:
            world: The ranks to reduce over. Ranks that read the same data count equally.

        Returns:
            A float for each scalar, in the order in which keys first appeared; the last batch's
            value for others.

        Raises:
            ValueError: On all ranks, if their keys differ.
        """
        last = {
            key: column.value
            for key, column in self._columns.items()
            if isinstance(column, _LastValue)
        }
        totals = self.state_dict()
        keys = world.agree(sorted(totals), f"the scalars that {self.step_name} reports")
        if not keys:
            return last
        pairs = torch.tensor([totals[key] for key in keys], dtype=torch.float64)
        sums, weights = world.all_reduce(pairs, "sum").unbind(1)
        means = dict(zip(keys, (sums / weights).tolist(), strict=True))
        return {key: means[key] for key in totals} | last

    def state_dict(self) -> dict[str, Any]:
        """The sums and weights of this rank so far; synchronizes with the device."""
        return {
            key: column.read()
            for key, column in self._columns.items()
            if isinstance(column, _WeightedSum)
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._columns = {
            key: _WeightedSum(f"{self.step_name} reports {key!r}", total, weight)
            for key, (total, weight) in state_dict.items()
        }

    def _new_column(self, key: str, value: Any) -> _WeightedSum | _LastValue:
        if type(key) is not str:
            raise TypeError(
                f"{self.step_name} returned a dict with the key {key!r}; keys are strings"
            )
        return (
            _WeightedSum(f"{self.step_name} reports {key!r}") if _is_scalar(value) else _LastValue()
        )


class _LastValue:
    """The last value of a key, of any kind."""

    value: Any

    def add(self, value: Any, weight: int) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            value = value.detach()
        self.value = value
        return value


class _WeightedSum:
    """Weighted sum of the scalars of a key, in float64, and the sum of their weights.

    Args:
        where: Which step reports which key, for the error.
        total: Sum to start from.
        weight: Sum of weights to start from.
    """

    def __init__(self, where: str, total: float = 0.0, weight: int = 0) -> None:
        self.where = where
        self._total: Tensor | float = total
        self._weight = weight
        self._values: list[Tensor | float] = []
        self._weights: list[int] = []

    def add(self, value: Any, weight: int) -> Any:
        """Add a scalar, and return it detached."""
        if not _is_scalar(value):
            raise TypeError(
                f"{self.where} as a single number in some batches and as {_described(value)} in "
                "this one; report one kind under one name"
            )
        if isinstance(value, Tensor):
            value = (value.detach() if value.requires_grad else value).clone()
        self._values.append(value)
        self._weights.append(weight)
        if len(self._values) == _FOLD_EVERY:
            self._fold()
        return value

    def read(self) -> list[float]:
        """The sum and the sum of weights; synchronizes with the device."""
        self._fold()
        return [float(self._total), self._weight]

    def _fold(self) -> None:
        """Add the buffered values to the sum."""
        tensors, weights = [], []
        for value, weight in zip(self._values, self._weights, strict=True):
            if isinstance(value, Tensor):
                tensors.append(value if value.dim() == 0 else value.reshape(()))
                weights.append(weight)
            else:
                self._total = self._total + _as_float(value) * weight
        if tensors:
            values = torch.stack(tensors).double()
            # A blocking copy would wait for all work that is queued on the device.
            factors = torch.tensor(weights, dtype=torch.float64).to(
                values.device, non_blocking=True
            )
            self._total = self._total + (values * factors).sum()
        self._weight += sum(self._weights)
        self._values.clear()
        self._weights.clear()


def _as_dict(result: Any, step_name: str) -> dict[str, Any]:
    """The result of a step that didn't return a plain dict."""
    if isinstance(result, Tensor):
        return {"loss": result}
    if isinstance(result, Mapping):
        return dict(result)
    raise TypeError(
        f"{step_name} returned {_described(result)}; return a dict "
        'such as {"loss": loss}, or the loss as a tensor'
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def _as_float(value: float) -> float:
    """The number as a float; infinite if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__qualname__} ({value!r:.80})"
