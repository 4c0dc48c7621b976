"""Moves a batch, whatever loaders put into one, to a device."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any

import torch
from torch import Tensor

_SEQUENCES_OF_NUMBERS = (str, bytes, bytearray, memoryview, range)


def moved_to(device: torch.device, batch: Any) -> Any:
    """The batch with all that it holds on a device. From pinned memory, the host doesn't wait.

    - What has a method `to` moves itself: tensors, PackedSequence, TensorDict, BatchEncoding. It
      is called with `non_blocking=True` if it takes that.
    - Of mappings, sequences, named tuples and dataclasses, also frozen ones, a shallow copy gets
      the moved items, so that types, orders, default factories and other attributes are kept. If
      nothing in one moves, it is returned as it is.
    - All else stays: strings, numbers, arrays, sets, objects of other types.

    Args:
        device: Where to.
        batch: Not changed, unless its own `to` changes it.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    kind: Any = type(batch)  # an attribute of the instance may be an item named "to"
    if callable(getattr(kind, "to", None)):
        options = {"non_blocking": True} if _takes_non_blocking(kind) else {}
        moved = batch.to(device, **options)
        return batch if moved is None else moved
    if isinstance(batch, Mapping):
        return _moved_mapping(device, batch)
    if isinstance(batch, Sequence) and not isinstance(batch, _SEQUENCES_OF_NUMBERS):
        return _moved_sequence(device, batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _moved_dataclass(device, batch)
    return batch


@functools.cache
def _takes_non_blocking(kind: Any) -> bool:
    try:
        parameters = inspect.signature(kind.to).parameters
    except ValueError:  # an extension type that doesn't show its signature
        return False
    return "non_blocking" in parameters or any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _moved_items(device: torch.device, items: Iterable[Any]) -> list[Any] | None:
    """The moved items; None if none of them is moved."""
    before = list(items)
    after = [moved_to(device, item) for item in before]
    return None if all(map(operator.is_, before, after)) else after


def _moved_mapping(device: torch.device, batch: Mapping[Any, Any]) -> Mapping[Any, Any]:
    items = _moved_items(device, batch.values())
    if items is None:
        return batch
    moved = zip(batch, items, strict=True)
    if not isinstance(batch, MutableMapping):
        return type(batch)(dict(moved))  # type: ignore[call-arg]  # as torch's own collate does
    clone = copy.copy(batch)
    for key, item in moved:  # the outputs of Hugging Face's models refuse update()
        clone[key] = item
    return clone


def _moved_sequence(device: torch.device, batch: Sequence[Any]) -> Sequence[Any]:
    items = _moved_items(device, batch)
    if items is None:
        return batch
    if isinstance(batch, MutableSequence):
        clone = copy.copy(batch)
        for index, item in enumerate(items):
            clone[index] = item
        return clone
    make: Any = getattr(batch, "_make", type(batch))  # named tuples have it
    moved: Sequence[Any] = make(items)
    return moved


def _moved_dataclass(device: torch.device, batch: Any) -> Any:
    # Not dataclasses.replace: it runs __post_init__ again, and refuses fields that aren't in it.
    names = [field.name for field in dataclasses.fields(batch) if hasattr(batch, field.name)]
    items = _moved_items(device, (getattr(batch, name) for name in names))
    if items is None:
        return batch
    clone = copy.copy(batch)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(clone, name, item)  # also if it is frozen
    return clone
