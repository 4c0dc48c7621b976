"""Reductions and gathers of tensors on their device, of numbers, and of dicts of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dream_trainer.numbers import as_number
from dream_trainer.world import cpu_collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ReduceOp = Literal["mean", "sum", "min", "max"]

_OPS = {
    "mean": dist.ReduceOp.SUM,
    "sum": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}


_LARGEST_EXACT = 2**53
"""Integers up to this are exact in float64."""


def reduced(value: Any, op: ReduceOp, group: ProcessGroup | None) -> Any:
    """The value reduced over a group; `None` is a group of one.

    Args:
        value: A tensor, a number, or a dict of them. Not changed.
        op: "mean", "sum", "min" or "max".
        group: The ranks to reduce over.

    Returns:
        The same kind as `value`; a mean of integers or booleans is a float, and so is the result if
        any rank's value is.

    Raises:
        ValueError: If `op` is none of the four, or a whole number isn't exact in float64.
        TypeError: If `value` can't be reduced.
    """
    if op not in _OPS:
        raise ValueError(f"op={op!r}: one of {', '.join(map(repr, _OPS))} is required")
    if isinstance(value, Mapping):
        # The order of keys may differ between ranks.
        results = {key: reduced(value[key], op, group) for key in sorted(value, key=str)}
        return {key: results[key] for key in value}
    if isinstance(value, Tensor):
        return _reduced_tensor(value, op, group)
    number = as_number(value)
    if number is not None:
        return _reduced_number(number, op, group)  # type: ignore[arg-type]  # no tensor
    raise TypeError(
        f"a {type(value).__qualname__} can't be reduced over ranks; "
        "a tensor, a number or a dict of them is required"
    )


def kinds(value: Any) -> Any:
    """What must be equal on all ranks for a value to be reduced: keys, shapes, dtypes."""
    if isinstance(value, Mapping):
        return {key: kinds(value[key]) for key in sorted(value, key=str)}
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "a number"


def _reduced_number(value: float, op: ReduceOp, group: ProcessGroup | None) -> float:
    is_float = isinstance(value, float)
    if not is_float and abs(value) > _LARGEST_EXACT:
        raise ValueError(
            f"{value} can't be reduced exactly: whole numbers up to 2**53 are required; "
            "give a tensor of dtype int64"
        )
    # A rank without samples may pass 0 where others pass 0.5: one dtype for both.
    pair = torch.tensor([value, -is_float if op == "min" else is_float], dtype=torch.float64)
    number, any_float = _reduced_tensor(pair, op, group).tolist()
    if op == "mean" or any_float:
        return float(number)
    is_flag = isinstance(value, bool) and op in ("min", "max")
    return bool(number) if is_flag else int(number)


def _reduced_tensor(value: Tensor, op: ReduceOp, group: ProcessGroup | None) -> Tensor:
    if value.dtype is torch.bool:
        # NCCL can't reduce bool.
        result = _reduced_tensor(value.to(torch.int32), op, group)
        return result.bool() if op in ("min", "max") else result
    if op == "mean" and not value.is_floating_point() and not value.is_complex():
        value = value.to(torch.float32)
    result = value.detach().clone()
    if group is not None:
        dist.all_reduce(result, _OPS[op], group=group)
        if op == "mean":
            result /= group.size()
    return result


def gathered(value: Any, group: ProcessGroup | None, objects_group: ProcessGroup | None) -> Any:
    """The values of all ranks: a tensor `(ranks, *shape)` for a tensor, otherwise a list."""
    if isinstance(value, Tensor):
        value = value.detach()
        if group is None:
            return value.unsqueeze(0).clone()
        parts = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(parts, value.contiguous(), group=group)
        return torch.stack(parts)
    return cpu_collectives.gathered_objects(value, objects_group)
