"""Moves a batch, whatever loaders put into one, to a device."""

from __future__ import annotations

import array
import copy
import dataclasses
import functools
import inspect
import operator
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound="MutableMapping[Any, Any] | MutableSequence[Any]")

_SEQUENCES_OF_NUMBERS = (str, bytes, bytearray, memoryview, range, array.array)


def moved_to(device: torch.device, batch: Any) -> Any:
    """A copy of a batch with its tensors on a device. From pinned memory, the host doesn't wait,
    except for MPS.

    - Objects with a `to` method are moved by it: tensors, PackedSequence, TensorDict,
      BatchEncoding. It is called with `non_blocking=True` if it takes that.
    - Of mappings, sequences, named tuples, dataclasses, also frozen ones, and SimpleNamespaces, a
      shallow copy gets the moved items, so that types, orders, default factories and other
      attributes are kept. If nothing in one moves, it is returned as it is.
    - Other objects are returned unchanged: strings, numbers, arrays, sets, objects of other types.

    Args:
        device: Target device.
        batch: Not changed, unless its own `to` changes it.

    Raises:
        TypeError: If a shallow copy of a container shares its items with the container.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type != "mps")
    kind: Any = type(batch)  # an attribute of the instance may be an item named "to"
    if callable(getattr(kind, "to", None)):
        does_not_wait = device.type != "mps" and _takes_non_blocking(kind)
        options = {"non_blocking": True} if does_not_wait else {}
        moved = batch.to(device, **options)
        return batch if moved is None else moved
    if isinstance(batch, Mapping):
        return _moved_mapping(device, batch)
    if isinstance(batch, Sequence) and not isinstance(batch, _SEQUENCES_OF_NUMBERS):
        return _moved_sequence(device, batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return _moved_attributes(device, batch, [each.name for each in dataclasses.fields(batch)])
    if isinstance(batch, SimpleNamespace):
        return _moved_attributes(device, batch, list(vars(batch)))
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
    return _copy_with(batch, moved)


def _moved_sequence(device: torch.device, batch: Sequence[Any]) -> Sequence[Any]:
    items = _moved_items(device, batch)
    if items is None:
        return batch
    if isinstance(batch, MutableSequence):
        return _copy_with(batch, enumerate(items))
    make: Any = getattr(batch, "_make", type(batch))  # named tuples have it
    moved: Sequence[Any] = make(items)
    return moved


def _copy_with(batch: C, items: Iterable[tuple[Any, Any]]) -> C:
    clone = copy.copy(batch)
    for key, item in items:  # the outputs of Hugging Face's models refuse update()
        before = batch[key]
        clone[key] = item
        if batch[key] is not before:
            batch[key] = before
            raise TypeError(
                f"a copy.copy of a {type(batch).__qualname__} shares its items with the original, "
                "so moving the copy to the device would change the data set's batch; give the "
                "class a __copy__, a method to(device), or override move_batch"
            )
    return clone


def _moved_attributes(device: torch.device, batch: Any, names: list[str]) -> Any:
    # Not dataclasses.replace: it runs __post_init__ again, and refuses fields that aren't in it.
    names = [name for name in names if hasattr(batch, name)]
    items = _moved_items(device, (getattr(batch, name) for name in names))
    if items is None:
        return batch
    clone = copy.copy(batch)
    for name, item in zip(names, items, strict=True):
        object.__setattr__(clone, name, item)  # also if it is frozen
    return clone
