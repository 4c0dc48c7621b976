"""What ranks do together, on tensors, numbers and dicts of them; and the norm of all gradients."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

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
"""Of whole numbers, in float64."""


def reduced(value: Any, op: ReduceOp, group: ProcessGroup | None) -> Any:
    """The value reduced over a group; `None` is a group of one.

    Args:
        value: A tensor, a number, or a dict of them. Not changed.
        op: "mean", "sum", "min" or "max".
        group: Whom to reduce over.

    Returns:
        The same kind as `value`; a mean of whole numbers or booleans is a float, and so is what
        is reduced with another rank's float.

    Raises:
        ValueError: If `op` is none of the four, or a whole number isn't exact in float64.
        TypeError: If `value` can't be reduced.
    """
    if op not in _OPS:
        raise ValueError(f"op={op!r}: one of {', '.join(map(repr, _OPS))} is required")
    if isinstance(value, Mapping):
        # Each rank may have filled its own in another order.
        results = {key: reduced(value[key], op, group) for key in sorted(value, key=str)}
        return {key: results[key] for key in value}
    if isinstance(value, Tensor):
        return _reduced_tensor(value, op, group)
    if isinstance(value, (bool, int, float)):
        return _reduced_number(value, op, group)
    raise TypeError(
        f"a {type(value).__qualname__} can't be reduced over ranks; "
        "a tensor, a number or a dict of them is required"
    )


def kinds(value: Any) -> Any:
    """What has to be alike on all ranks for a value to be reduced: keys, shapes, dtypes."""
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
    # A rank that counted nothing may give 0 where the others give 0.5: one dtype for both.
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
    """Everyone's values: a tensor `(ranks, *shape)` for a tensor, a list for anything else."""
    if isinstance(value, Tensor):
        value = value.detach()
        if group is None:
            return value.unsqueeze(0).clone()
        parts = [torch.empty_like(value) for _ in range(group.size())]
        dist.all_gather(parts, value.contiguous(), group=group)
        return torch.stack(parts)
    if objects_group is None:
        return [value]
    mine = _bytes_tensor(value)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(objects_group.size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=objects_group)
    longest = max(int(length) for length in lengths)
    padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, padded, group=objects_group)
    return [_object(part, int(length)) for part, length in zip(parts, lengths, strict=True)]


def broadcast_object(value: Any, src: int, group: ProcessGroup) -> Any:
    """The picklable object of rank `src`; what others give doesn't matter."""
    is_source = dist.get_rank() == src
    mine = _bytes_tensor(value) if is_source else torch.empty(0, dtype=torch.uint8)
    length = torch.tensor([len(mine)])
    dist.broadcast(length, src, group=group)
    data = mine if is_source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, src, group=group)
    return value if is_source else _object(data, int(length))


# torch's own object collectives need numpy, which nothing else here does.


def _bytes_tensor(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _object(data: Tensor, length: int) -> Any:
    # It comes from this run's own ranks, which run the same code anyway.
    return pickle.loads(ctypes.string_at(data.data_ptr(), length))  # noqa: S301


def disagreements(said: Sequence[Mapping[str, Any]]) -> str:
    """Says of each value that differs which ranks said what.

    Args:
        said: What each rank said, by rank: values by name.
    """
    names = dict.fromkeys(name for values in said for name in values)
    first = said[0]
    different = [
        name
        for name in names
        if any(name not in each or name not in first or each[name] != first[name] for each in said)
    ]
    parts = []
    for name in different[:_MAX_DISAGREEMENTS]:
        values = [repr(values[name]) if name in values else "nothing" for values in said]
        parts.append(f"ranks disagree on {name}:\n  " + grouped(values, "\n  "))
    more = len(different) - len(parts)
    parts.append(
        f"{f'and on {more} more; ' if more else ''}it must be the same on all of them: look for "
        "what depends on the rank, the machine or chance"
    )
    return "\n".join(parts)


_MAX_DISAGREEMENTS = 4


def grouped(values: Sequence[str], separator: str = "; ") -> str:
    """What each rank said, once for all that said the same: `rank 0–6: 10; rank 7: 11`."""
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    said = (f"rank {_ranges(ranks)}: {value}" for value, ranks in ranks_by_value.items())
    return separator.join(said)


def _ranges(ranks: Sequence[int]) -> str:
    """Ranks in a row as `0–6`: there may be thousands."""
    parts: list[str] = []
    start = 0
    for end in range(1, len(ranks) + 1):
        if end < len(ranks) and ranks[end] == ranks[end - 1] + 1:
            continue
        row = ranks[start:end]
        parts += [f"{row[0]}–{row[-1]}"] if len(row) > 2 else map(str, row)
        start = end
    return ", ".join(parts)


def gradient_norm(parameters: Sequence[nn.Parameter], max_norm: float | None = None) -> Tensor:
    """L2 norm of all gradients of one process together; clips them to it if asked.

    No host synchronization.

    Args:
        parameters: Those without a gradient count as zero.
        max_norm: Scale all gradients by `max_norm / norm` where that is below 1.

    Returns:
        Scalar `()`: the norm before clipping.

    Raises:
        ValueError: If no parameter has a gradient.
    """
    _refuse_without_gradient(parameters)
    if max_norm is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def sharded_gradient_norm(
    parameters: Sequence[nn.Parameter], max_norm: float | None = None
) -> Tensor:
    """L2 norm of all gradients together, over every shard; clips them to it if asked.

    Collective over the meshes of sharded parameters: each rank must call it with its own
    shards of the same parameters. No host synchronization. Gradients that are replicated count
    once. Those on different meshes, or on none, are normed apart and then together: torch can't
    mix them in one operation.

    Args:
        parameters: Those without a gradient count as zero.
        max_norm: Scale all gradients by `max_norm / norm` where that is below 1.

    Returns:
        Scalar `()`, equal on all ranks: the norm before clipping.

    Raises:
        ValueError: If no parameter has a gradient.
    """
    _refuse_without_gradient(parameters)
    groups = _by_mesh([parameter for parameter in parameters if parameter.grad is not None])
    norms = [
        _whole(torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]))
        for group in groups
    ]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    if max_norm is not None:
        for group in groups:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm


def _refuse_without_gradient(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.grad is not None:
            return
    raise ValueError(
        "no parameter has a gradient; call self.backward(loss) before self.step(optimizer)"
    )


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters, those apart whose gradients are sharded over other meshes."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(_mesh_of(parameter), []).append(parameter)
    return list(groups.values())


def _mesh_of(parameter: nn.Parameter) -> Any:
    from torch.distributed.tensor import DTensor

    return parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None


def _whole(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


RANK_ZERO = (
    "the other ranks don't run this hook and would never join; make the callback a plain "
    "Callback and ask world.is_global_zero before what only rank 0 does"
)
AFTER_ERROR = (
    "the other ranks may be gone and would never join; on_exception, and post_fit where "
    "trainer.exception is set, must do without collectives"
)


class RefuseCollectives(TorchDispatchMode):
    """Makes every collective of torch.distributed an error.

    Args:
        where: Named in the error.
        advice: The end of the error.
    """

    def __init__(self, where: str, advice: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._where = where
        self._advice = advice

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            raise RuntimeError(refusal(func.name(), self._where, self._advice))
        return func(*args, **(kwargs or {}))


def refusal(collective: str, where: str, advice: str) -> str:
    """Says why a collective can't be called there, and what to do instead."""
    return f"{collective} in {where}: {advice}"
