"""DTensors: what is one, and this rank's part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def as_dtensor(value: object) -> DTensor | None:
    """The value if it is a DTensor."""
    if type(value) in (Tensor, nn.Parameter) or not isinstance(value, Tensor):
        return None  # importing DTensor takes long
    from torch.distributed.tensor import DTensor

    return value if isinstance(value, DTensor) else None


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor."""
    return as_dtensor(value) is not None


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it, if it isn't a DTensor. Shares its memory."""
    sharded = as_dtensor(tensor)
    return tensor if sharded is None else sharded.to_local()
