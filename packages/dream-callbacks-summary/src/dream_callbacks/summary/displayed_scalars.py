"""Scalars for display: choosing one from a step's result and reading it without a device sync."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dream_trainer.numbers import as_number, is_readable_alone


class AsyncScalar:
    """The latest value of a scalar that has reached the host.

    A value on a CUDA device is copied asynchronously and available at a later `read`, so `read`
    never syncs. On other devices it does.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self._pending_copy: tuple[Tensor, Any] | None = (
            None  # a copy under way, and the event after it
        )

    def read(self, scalar: Any) -> None:
        """Read a scalar, and complete an earlier copy that has finished.

        Args:
            scalar: A number or a detached tensor with one element; anything else is ignored.
        """
        if self._pending_copy is not None:
            copy, copied = self._pending_copy
            if copied.query():
                self.value, self._pending_copy = copy.item(), None
        local = readable_number(scalar)
        if local is None:
            return
        if not isinstance(local, Tensor):
            self.value = local
        elif local.device.type != "cuda":
            self.value = local.item()  # host sync once per refresh; none on CPU
        elif self._pending_copy is None:
            copy = local.to("cpu", non_blocking=True)  # into pinned memory
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(local.device))
            self._pending_copy = (copy, copied)


def readable_number(value: Any) -> float | Tensor | None:
    """A plain number or tensor; None if it isn't a number, or reading it takes other ranks."""
    return as_number(value) if is_readable_alone(value) else None


def default_metric(result: Mapping[str, Any]) -> str | None:
    """Choose the scalar to show: "loss", else the first with "loss" in its name, else the first.

    Returns:
        Key of the scalar; None if the result has no scalar.
    """
    keys = [key for key, value in result.items() if readable_number(value) is not None]
    return min(keys, key=lambda key: (key != "loss", "loss" not in key.lower()), default=None)


def read_scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of an epoch's result as numbers, by name. Device tensors cost a device sync each."""
    numbers = {key: readable_number(value) for key, value in result.items()}
    return {
        key: number.item() if isinstance(number, Tensor) else number
        for key, number in numbers.items()
        if number is not None
    }
