"""State of a metric in the middle of an epoch: what has changed in it since it was reset."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dream_trainer.callbacks.plain_data import values_not_plain
from dream_trainer.trainer.metrics import Metric

_OF_MODULE = frozenset(vars(nn.Module()))
"""Attributes of torch's own in each module."""


class MetricState:
    """Saves and restores what batches change in a metric.

    The state is what `state_dict` of the metric returns, if it has that and `load_state_dict` and
    isn't a module. Otherwise it is its attributes (those of its submodules too, if it is a module)
    that aren't as they were after `reset`: numbers, strings, tensors, and lists, tuples, sets and
    dicts of them. Other attributes aren't saved. The state of a torchmetrics metric isn't in its
    own `state_dict` unless it was made persistent.

    Args:
        metric: It is reset.
    """

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        metric.reset()
        self._after_reset = {} if self._has_own_state else copy.deepcopy(self._attributes())

    def read(self) -> dict[str, Any]:
        """This rank's state, as plain data. Device tensors sync."""
        metric: Any = self.metric
        if self._has_own_state:
            return {"own": metric.state_dict()}
        return {
            part: {
                name: _copied(value)
                for name, value in attributes.items()
                if not _equal(value, self._after_reset.get(part, {}).get(name, _MISSING))
            }
            for part, attributes in self._attributes().items()
        }

    def restore(self, state: Mapping[str, Any], device: torch.device) -> bool:
        """Reset the metric and continue from a state.

        Returns:
            False if the state is of a metric with other parts; it is only reset then.
        """
        metric: Any = self.metric
        metric.reset()
        parts = {"own"} if self._has_own_state else set(self._after_reset)
        if parts != set(state):
            return False
        if self._has_own_state:
            metric.load_state_dict(state["own"])
            return True
        owners = dict(_parts(metric))
        for part, attributes in state.items():
            for name, value in attributes.items():
                setattr(owners[part], name, _copied(value, device))
        return True

    def unsaved(self) -> list[str]:
        """Names of attributes that hold data and can't be saved."""
        if self._has_own_state:
            return []
        return [
            f"{part}.{name}".removeprefix(".")
            for part, owner in _parts(self.metric)
            for name, value in _own_attributes(owner)
            if _holds_data(value) and any(values_not_plain(value))
        ]

    @property
    def _has_own_state(self) -> bool:
        kind = type(self.metric)
        return not isinstance(self.metric, nn.Module) and all(
            callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict")
        )

    def _attributes(self) -> dict[str, dict[str, Any]]:
        """Attributes that are plain data, by part of the metric."""
        return {
            part: {
                name: value
                for name, value in _own_attributes(owner)
                if not any(values_not_plain(value))
            }
            for part, owner in _parts(self.metric)
        }


_MISSING = object()


def _parts(metric: Any) -> Iterator[tuple[str, Any]]:
    """The metric, by the name "", and its submodules by theirs."""
    if isinstance(metric, nn.Module):
        yield from metric.named_modules()
    else:
        yield "", metric


def _own_attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(owner, nn.Module):
        yield from owner.named_buffers(recurse=False)
        yield from ((name, v) for name, v in vars(owner).items() if name not in _OF_MODULE)
    else:
        yield from getattr(owner, "__dict__", {}).items()


def _holds_data(value: Any) -> bool:
    """Whether a value is an array, or a container other than of functions."""
    if isinstance(value, Mapping):
        return not any(callable(each) for each in value.values())
    is_array = hasattr(type(value), "__array__") and not isinstance(value, Tensor)
    return is_array or isinstance(value, (deque, set, frozenset))


def _copied(value: Any, device: torch.device | None = None) -> Any:
    """A copy of plain data; on a device, if it is given. Tensors are copied only then."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device, copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(each, device) for each in value)
    result = copy.copy(value)
    if isinstance(value, dict):
        result.update({key: _copied(each, device) for key, each in value.items()})
    return result


def _equal(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
