"""Scalars in a step's result: which one to show, and how to read it without waiting for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LateScalar:
    """The newest value of a scalar that the host knows.

    A value on a CUDA device is copied while the device goes on and is known by the next `read`,
    so reading never waits. Other devices are waited for.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._coming: tuple[Tensor, Any] | None = None  # a copy under way, and the event after it

    def read(self, scalar: Any) -> None:
        """Take in a scalar, or what an earlier one has become known as.

        Args:
            scalar: A number or a tensor with one element, detached; anything else is passed over.
        """
        if self._coming is not None:
            copy, copied = self._coming
            if copied.query():
                self.value, self._coming = copy.item(), None
        if not is_scalar(scalar):
            return
        local = _local(scalar)
        if not isinstance(local, Tensor):
            self.value = local
        elif local.device.type != "cuda":
            self.value = local.item()  # host sync: once per refresh, and the CPU has it already
        elif self._coming is None:
            copy = local.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(local.device))
            self._coming = (copy, copied)


def is_scalar(value: Any) -> bool:
    """Whether a value is one real number that this rank knows by itself."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and _local(value) is not None
    return isinstance(value, (int, float))


def scalar_to_show(result: Mapping[str, Any]) -> str | None:
    """The loss-like first scalar of a result: "loss", else one with "loss" in its name, else any.

    Returns:
        Its key; None if there is no scalar.
    """
    keys = [key for key, value in result.items() if is_scalar(value)]
    return min(keys, key=lambda key: (key != "loss", "loss" not in key.lower()), default=None)


def numbers_in(result: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of an epoch's result, by name. Waits for the device where they are tensors."""
    locals_ = {key: _local(value) for key, value in result.items() if is_scalar(value)}
    return {
        key: value.item() if isinstance(value, Tensor) else value for key, value in locals_.items()
    }


def _local(value: Any) -> Any:
    """A distributed tensor's value on this rank; None if it takes other ranks to know it."""
    if type(value) is Tensor or not isinstance(value, Tensor):
        return value
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    return value.to_local() if all(p.is_replicate() for p in value.placements) else None
