"""Results of steps, and their means over an epoch and over ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from dream_trainer.numbers import as_number, exact_dtype, to_float
from dream_trainer.world.world import World

logger = logging.getLogger(__name__)

_FOLD_EVERY = 128
"""Tensors that are buffered before they are summed in one operation."""


class WeightedMean:
    """A mean in a step's result with a weight of its own, instead of the batch's samples.

    Return `{"loss": WeightedMean(loss, num_tokens)}` for a mean over tokens, pixels or nodes. The
    epoch's mean is then the sum of value times weight, over the sum of the weights, of all batches
    and ranks. A value with weight 0 isn't counted, even if it is NaN.

    Tensors stay on their device: no host synchronization.

    Args:
        value: The mean over `weight` items; any number.
        weight: Number of items, at least 0; any number.

    Raises:
        TypeError: If `value` or `weight` isn't a number.
        ValueError: If `weight` is negative or not finite, unless it is a tensor.
    """

    __slots__ = ("value", "weight")

    value: float | Tensor
    weight: float | Tensor

    def __init__(self, value: Any, weight: Any) -> None:
        number = as_number(value)
        if number is None:
            raise TypeError(
                f"WeightedMean of {described(value)}; a mean is one number: give its .mean()"
            )
        self.value = number
        self.weight = checked_weight(weight, "the weight of a WeightedMean")

    def __repr__(self) -> str:
        return f"WeightedMean({self.value!r}, {self.weight!r})"


class WeightedResult(dict[str, Any]):
    """What callbacks see of a result with a WeightedMean: its values, and the weights apart.

    Attributes:
        weights: Weights of the values that were returned as WeightedMean, by key. Detached tensors
            or numbers, of this rank and this batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, float | Tensor] = {}


def weights_of(result: Mapping[str, Any]) -> Mapping[str, float | Tensor]:
    """Weights of the values that a step returned as WeightedMean, by key.

    Args:
        result: As passed to `post_train_step` or `post_validation_step`.
    """
    return result.weights if isinstance(result, WeightedResult) else {}


class EpochMeans:
    """Weighted means of the numbers that the batches of one epoch report.

    A tensor is copied when it is added, on its device, since its memory may change afterwards: that
    of a parameter with the next step, that of a CUDA graph's output with the next replay. Copies
    are buffered, and summed some batches later in one operation per key.

    None isn't counted. Of values that aren't numbers, the last batch's are kept, without a copy.
    They are named once in the log: as a warning if they are complex or decimal numbers, else as
    information.

    Args:
        step_name: Name of the method whose results these are, for errors.
        named: Keys that were named in the log; shared by the means of several epochs.
    """

    def __init__(self, step_name: str, named: set[str] | None = None) -> None:
        self.step_name = step_name
        self._named = set() if named is None else named
        self._columns: dict[str, _Mean | _LastValue] = {}

    def add(self, result: Any, num_samples: Any) -> dict[str, Any]:
        """Add the result of a step. No host synchronization.

        Collective if the result has a DTensor that isn't replicated as a number: it is brought to
        its full value here, where each rank of its mesh is, since callbacks may read it on one.

        Args:
            result: What the step returned.
            num_samples: Weight of the batch for numbers that aren't a WeightedMean.

        Returns:
            The result as a dict of detached values; numbers are Python numbers or tensors with one
            element, copies that nothing overwrites. A WeightedResult if there is a WeightedMean.

        Raises:
            TypeError: If it is neither a dict with string keys nor a number, or a key that was
                reported as a number isn't one now.
        """
        if type(num_samples) is not int or num_samples < 0:
            num_samples = checked_weight(num_samples, "num_samples(batch)")
        if type(result) is not dict:
            result = _as_dict(result, self.step_name)
        report: dict[str, Any] = {}
        for key, value in result.items():
            weight = num_samples
            if type(value) is WeightedMean:
                weight, value = value.weight, value.value
                if not isinstance(report, WeightedResult):
                    report = _weighted(report)
                report.weights[key] = weight
            number = as_number(value)
            column = self._columns.get(key)
            if column is None:
                column = self._new_column(key, value, number)
            report[key] = value if column is None else column.add(value, number, weight)
        return report

    def reduce(self, world: World) -> dict[str, Any]:
        """The means over the batches of all ranks that reported them.

        Collective; synchronizes with the device. One all-reduce, and one exchange of 72 bytes; more
        only where ranks reported different keys.

        Args:
            world: The ranks to reduce over. Ranks that read the same data count equally.

        Returns:
            A float for each number, equal on all ranks, in the order in which keys first appeared;
            NaN where all weights are 0. The last batch's value of this rank for others.
        """
        totals = self.state_dict()
        keys = world.union(totals)
        means: dict[str, Any] = {}
        if keys:
            pairs = torch.tensor([totals.get(key, (0.0, 0)) for key in keys], dtype=torch.float64)
            sums, weights = world.all_reduce(pairs, "sum").unbind(1)
            means = dict(zip(keys, (sums / weights).tolist(), strict=True))
        last = {
            key: column.value
            for key, column in self._columns.items()
            if isinstance(column, _LastValue) and key not in means
        }
        if world.is_global_zero:
            self._name_once(last)
        return {key: means[key] for key in totals} | means | last

    def state_dict(self) -> dict[str, Any]:
        """The sums and weights of this rank so far; synchronizes with the device."""
        return {
            key: column.read() for key, column in self._columns.items() if isinstance(column, _Mean)
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._columns = {
            key: _Mean(f"{self.step_name} reports {key!r}", total, weight)
            for key, (total, weight) in state_dict.items()
        }

    def _new_column(
        self, key: str, value: Any, number: float | Tensor | None
    ) -> _Mean | _LastValue | None:
        if type(key) is not str:
            raise TypeError(
                f"{self.step_name} returned a dict with the key {key!r}; keys are strings"
            )
        if value is None:
            return None
        where = f"{self.step_name} reports {key!r}"
        column = self._columns[key] = _LastValue() if number is None else _Mean(where)
        return column

    def _name_once(self, values: Mapping[str, Any]) -> None:
        for key in values.keys() - self._named:
            is_expected = not isinstance(values[key], Number)  # pictures, logits, texts
            logger.log(
                logging.INFO if is_expected else logging.WARNING,
                "%s reports %r as %s, which isn't a real number, so it has no mean: the epoch's "
                "result has the last batch's",
                self.step_name,
                key,
                described(values[key]),
            )
        self._named.update(values)


def with_metrics(
    result: Mapping[str, Any], metrics: Mapping[str, Any], step_name: str
) -> dict[str, Any]:
    """The result of an epoch with the values of its metrics.

    Raises:
        ValueError: If a metric has the key of a value that the step reports.
    """
    if clashing := sorted(result.keys() & metrics.keys()):
        raise ValueError(
            f"{clashing[0]!r} is reported by {step_name}, and is the name of a metric too; "
            "give one of them another name"
        )
    return {**result, **metrics}


def checked_weight(weight: Any, what: str) -> float | Tensor:
    """A weight as a Python number or a tensor with one element. No device sync.

    Raises:
        TypeError: If it isn't a number.
        ValueError: If it is a Python number that is negative or not finite.
    """
    number = as_number(weight)
    if number is None:
        raise TypeError(f"{what} is {described(weight)}; one number, at least 0, is required")
    if not isinstance(number, Tensor) and not 0 <= number < math.inf:
        raise ValueError(f"{what} is {number!r}; a finite number, at least 0, is required")
    return number


def described(value: Any) -> str:
    """A value in an error: a tensor by its shape."""
    if isinstance(value, Tensor):
        kind = f"a {value.dtype} tensor".replace("torch.", "") if value.is_complex() else "a tensor"
        return f"{kind} of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__qualname__} ({value!r:.80})"


class _LastValue:
    """The last value of a key, of any kind."""

    value: Any = None

    def add(self, value: Any, number: float | Tensor | None, weight: float | Tensor) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            value = value.detach()
        if value is not None:
            self.value = value
        return value


class _Mean:
    """Weighted mean of the numbers of a key.

    Args:
        where: Which step reports which key, for the error.
        total: Sum of value times weight to start from.
        weight: Sum of weights to start from.
    """

    def __init__(self, where: str, total: float = 0.0, weight: float = 0) -> None:
        self.where = where
        self._total = _Sum(total)
        self._weight = _Sum(weight)

    def add(self, value: Any, number: float | Tensor | None, weight: float | Tensor) -> Any:
        """Add a number, and return it; as a copy, if it is a tensor."""
        if number is None:
            if value is None:
                return None
            raise TypeError(
                f"{self.where} as a single number in some batches and as {described(value)} in "
                "this one; report one kind under one name"
            )
        tensor = number.clone() if isinstance(number, Tensor) else None
        if type(weight) is not int and isinstance(weight, Tensor):
            weight = weight.to(exact_dtype(weight.device), copy=True).reshape(())
            self._total.add_tensor(_product(number if tensor is None else tensor, weight), 1)
            self._weight.add_tensor(weight, 1)
        elif weight != 0:
            if tensor is None:
                self._total.total += to_float(number) * weight
            else:
                self._total.add_tensor(tensor, weight)
            self._weight.total += weight
        return number if tensor is None else tensor

    def read(self) -> list[float]:
        """The sum and the sum of weights; synchronizes with the device."""
        return [float(self._total.read()), self._weight.read()]


class _Sum:
    """Sum of numbers times factors, in float64. Tensors are summed on their device; those of MPS,
    which has no float64, on the host.

    Args:
        total: Value to start from.

    Attributes:
        total: The sum so far, without buffered tensors; numbers are added to it directly.
    """

    def __init__(self, total: float) -> None:
        self.total: Any = total
        self._tensors: list[Tensor] = []
        self._factors: list[float] = []

    def add_tensor(self, tensor: Tensor, factor: float) -> None:
        """Add a tensor, whose memory must not change any more, times a factor."""
        self._tensors.append(tensor)
        self._factors.append(factor)
        if len(self._tensors) == _FOLD_EVERY:
            self._fold()

    def read(self) -> float:
        """The sum; synchronizes with the device."""
        self._fold()
        return self.total.item() if isinstance(self.total, Tensor) else self.total

    def _fold(self) -> None:
        """Add the buffered tensors to the sum."""
        alike: dict[Any, tuple[list[Tensor], list[float]]] = {}
        for tensor, factor in zip(self._tensors, self._factors, strict=True):
            tensors, factors = alike.setdefault((tensor.device, tensor.dtype), ([], []))
            tensors.append(tensor if tensor.dim() == 0 else tensor.reshape(()))
            factors.append(factor)
        for (device, _), (tensors, factors) in alike.items():
            values, weights = torch.stack(tensors), torch.tensor(factors, dtype=torch.float64)
            if exact_dtype(device) is torch.float64:
                # A blocking copy would wait for all work that is queued on the device.
                weights = weights.to(device, non_blocking=True)
            else:
                values = values.cpu()  # waits for the device, once per _FOLD_EVERY batches
            self.total = self.total + (values.double() * weights).sum()
        self._tensors.clear()
        self._factors.clear()


def _product(number: float | Tensor, weight: Tensor) -> Tensor:
    """Number times weight, `()`, in `exact_dtype`; 0 where the weight is 0. No device sync."""
    if not isinstance(number, Tensor):
        return torch.where(weight == 0, 0.0, weight * to_float(number))
    if weight.device.type == "cpu":
        weight = weight.to(number.device, exact_dtype(number.device), non_blocking=True)
    number = number.to(weight.device, weight.dtype, non_blocking=True).reshape(())
    return torch.where(weight == 0, 0.0, weight * number)


def _weighted(report: dict[str, Any]) -> WeightedResult:
    result = WeightedResult()
    result.update(report)
    return result


def _as_dict(result: Any, step_name: str) -> dict[str, Any]:
    """The result of a step that didn't return a plain dict."""
    if isinstance(result, Mapping):
        return dict(result)
    if isinstance(result, (Tensor, WeightedMean)):
        return {"loss": result}
    raise TypeError(
        f"{step_name} returned {described(result)}; return a dict "
        'such as {"loss": loss}, or the loss as a tensor'
    )
