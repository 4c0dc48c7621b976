"""Metrics of a trainer: finding them in its attributes, and computing them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import nn

from dream_trainer.numbers import as_number

Path = tuple[Any, ...]
"""Name of an attribute, and the keys and indices that lead from its value to a metric."""

_METHODS = ("update", "compute", "reset")
_MAX_DEPTH = 4
_MAX_ITEMS = 1000
"""Longer lists and dicts hold data, not metrics."""


class Metric(Protocol):
    """An object that accumulates a value over batches, such as a torchmetrics Metric."""

    def update(self, *args: Any, **kwargs: Any) -> Any: ...

    def compute(self) -> Any: ...

    def reset(self) -> Any: ...


def is_metric(value: Any) -> bool:
    """Whether the class of a value has the methods of a metric."""
    # Not of the value: an object that answers to any name isn't a metric.
    return all(callable(getattr(type(value), name, None)) for name in _METHODS)


def find_metrics(attributes: Mapping[str, Any]) -> Iterator[tuple[Path, Metric]]:
    """The metrics in attributes whose names don't begin with an underscore, each once.

    Looks into lists, tuples, dicts, ModuleLists and ModuleDicts.
    """
    seen: set[int] = set()
    for name, value in attributes.items():
        if name.startswith("_"):
            continue
        for path, metric in _find_in(value, (name,)):
            if id(metric) not in seen:
                seen.add(id(metric))
                yield path, metric


def metric_at(owner: object, path: Path) -> Metric:
    """The metric that a path of `find_metrics` leads to."""
    value = getattr(owner, path[0])
    for key in path[1:]:
        value = value[key]
    return value  # type: ignore[no-any-return]


def compute_all(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The values of metrics: by the metric's name, or by the keys of a dict that it computes.

    Collective where a metric's `compute` is, as torchmetrics' are.

    Returns:
        Numbers as `dream_trainer.numbers.as_number` gives them; other values unchanged.

    Raises:
        ValueError: If two metrics give the same key.
    """
    values: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for name, metric in metrics.items():
        value = metric.compute()
        for key, each in value.items() if isinstance(value, Mapping) else [(name, value)]:
            _claim(key, name, owners)
            number = as_number(each)
            values[key] = each if number is None else number
    return values


def refuse_equal_keys(metrics: Mapping[str, Metric]) -> None:
    """Raise if two collections of metrics have a key in common, before anything is computed.

    Raises:
        ValueError: As `compute_all`.
    """
    owners: dict[str, str] = {}
    for name, metric in metrics.items():
        if isinstance(metric, nn.ModuleDict):  # as torchmetrics' MetricCollection is
            for key in metric.keys():  # noqa: SIM118  # iterating one gives keys without prefix
                _claim(key, name, owners)


def _find_in(value: Any, path: Path) -> Iterator[tuple[Path, Metric]]:
    if is_metric(value):
        yield path, value
    elif isinstance(value, (dict, list, tuple, nn.ModuleDict, nn.ModuleList)):
        if len(path) < _MAX_DEPTH and len(value) <= _MAX_ITEMS:
            for key, part in _items(value):
                yield from _find_in(part, (*path, key))


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    is_keyed = isinstance(value, (dict, nn.ModuleDict))
    return value.items() if is_keyed else enumerate(value)


def _claim(key: str, name: str, owners: dict[str, str]) -> None:
    owner = owners.setdefault(key, name)
    if owner != name:
        raise ValueError(
            f"the metrics {owner!r} and {name!r} both have the value {key!r}, so one would replace "
            f'the other; give one of them a prefix, as in MetricCollection(…, prefix="{name}/"), '
            "or other keys in the dict that its compute() returns"
        )
