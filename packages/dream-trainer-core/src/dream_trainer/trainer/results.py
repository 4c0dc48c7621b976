"""Results of steps, and their means over an epoch and over ranks."""

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

    Adding a result needs no device operation: scalars are buffered for some batches, then stacked
    and summed at once. Of values that aren't scalars, the last batch's are kept.

    Args:
        step_name: Name of the method whose results these are, for errors.
    """

    def __init__(self, step_name: str) -> None:
        self.step_name = step_name
        # Buffered values by key; for values that aren't scalars, the last one.
        self._columns: dict[str, list[Tensor | float] | deque[Any]] = {}
        self._pending_weights: list[int] = []
        self._sums: dict[str, Tensor | float] = {}
        self._weights: dict[str, int] = {}
        self._last: dict[str, Any] = {}

    def add(self, result: Any, batch: Any) -> dict[str, Any]:
        """Add the result of a step. No host synchronization.

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
        """The means over all samples of all ranks. Collective; synchronizes with the device.

        Args:
            world: The ranks to reduce over. Ranks that read the same data count equally.

        Returns:
            A float for each scalar, in the order in which keys first appeared; the last batch's
            value for others.

        Raises:
            ValueError: On all ranks, if their keys differ.
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
        """The sums and weights of this rank so far; synchronizes with the device."""
        self._fold()
        return {key: [float(self._sums[key]), self._weights[key]] for key in self._sums}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._columns, self._pending_weights, self._last = {}, [], {}
        self._sums = {key: total for key, (total, _) in state_dict.items()}
        self._weights = {key: weight for key, (_, weight) in state_dict.items()}

    def _begin_columns(self, result: dict[str, Any]) -> None:
        """Create buffers for a result whose keys differ from those before."""
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
        """Add the buffered scalars to the sums."""
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


def _stacked(key: str, column: Sequence[Tensor | float]) -> Tensor:
    """Scalars as one float64 vector, on their device."""
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
    """The number as a float; infinite if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__qualname__} ({value!r:.80})"
