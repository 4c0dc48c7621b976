"""Numbers: what counts as one in results, logs and checkpoints, and reading it.

A number is any `numbers.Real` (`bool`, `Fraction` and numpy's scalars included), an array with one
element, and a tensor with one element, as long as it isn't complex. A DTensor is one by its full
shape.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


def is_number(value: Any) -> bool:
    """Whether a value is one real number. Not collective; no device sync."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return _python_number(value) is not None


def as_number(value: Any) -> float | Tensor | None:
    """The number as a plain Python number or a plain tensor; None if it isn't a number.

    No device sync for tensors. Collective for a DTensor that isn't replicated: each rank of its
    mesh must call it.

    Returns:
        A `bool`, `int` or `float` for what isn't a tensor. For a tensor, that tensor detached, with
        its shape, dtype and device; for a DTensor its full value.
    """
    kind = type(value)
    if kind is Tensor:
        if value.numel() != 1 or value.is_complex():
            return None
        return value.detach() if value.requires_grad else value  # type: ignore[no-any-return]
    if kind is float or kind is int or kind is bool:
        return value  # type: ignore[no-any-return]
    if not isinstance(value, Tensor):
        return _python_number(value)
    if value.numel() != 1 or value.is_complex():
        return None
    detached: Any = value.detach()
    full: Tensor = detached.full_tensor() if _is_dtensor(detached) else detached
    return full


def as_float(value: Any) -> float | None:
    """The number as a float; None if it isn't a number. A device sync for a tensor on a device.

    Collective where `as_number` is.
    """
    number = as_number(value)
    return None if number is None else to_float(number)


def to_float(number: float | Tensor) -> float:
    """What `as_number` returned as a float; infinite if it is too large for one."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def exact_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums on a device: float64; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_readable_alone(value: Any) -> bool:
    """Whether a number can be read on this rank without the others.

    False for a DTensor that is sharded or holds partial sums.
    """
    return not _is_dtensor(value) or all(p.is_replicate() for p in value.placements)


def _python_number(value: Any) -> float | None:
    """A number that isn't a tensor, as `bool`, `int` or `float`."""
    if not isinstance(value, Real):
        # numpy.bool_ and arrays of any library: no import, since numpy is optional.
        if not hasattr(type(value), "__array__") or getattr(value, "size", None) != 1:
            return None
        value = value.item()
        if not isinstance(value, Real):
            return None
    return _plain(value)


def _plain(value: Any) -> float | None:
    if type(value) is bool:
        return value
    try:
        return int(value) if isinstance(value, Integral) else to_float(value)
    except (TypeError, ValueError):
        return None  # numpy.timedelta64 is registered as an integer


def _is_dtensor(value: Any) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # importing it takes 0.5 s
    return distributed is not None and isinstance(value, distributed.DTensor)
