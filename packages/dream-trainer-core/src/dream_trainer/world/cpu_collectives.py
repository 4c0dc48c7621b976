"""Collectives of flags, counts, bytes and picklable objects on a CPU group.

No device sync. Each takes a gloo group, or None for a world of one, where nothing is sent. Unlike
torch's own object collectives, they don't need numpy.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def maxima(values: Sequence[int], group: ProcessGroup | None) -> list[int]:
    """The elementwise maximum over ranks of some integers (int64)."""
    if group is None:
        return list(values)
    box = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(box, dist.ReduceOp.MAX, group=group)
    return [int(value) for value in box.tolist()]


def is_true_on_any(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether a flag is set on some rank."""
    return bool(maxima([flag], group)[0])


def is_true_on_all(flag: bool, group: ProcessGroup | None) -> bool:
    """Whether a flag is set on each rank."""
    return not is_true_on_any(not flag, group)


def gathered_ints(value: int, group: ProcessGroup | None) -> list[int]:
    """The integers (int64) of all ranks, by rank."""
    if group is None:
        return [value]
    values = [torch.zeros(1, dtype=torch.int64) for _ in range(group.size())]
    dist.all_gather(values, torch.tensor([value], dtype=torch.int64), group=group)
    return [int(each) for each in values]


def gathered_bytes(data: bytes, group: ProcessGroup | None) -> list[bytes]:
    """The bytes of all ranks, by rank. If all are empty, only their lengths are exchanged."""
    if group is None:
        return [data]
    lengths = gathered_ints(len(data), group)
    longest = max(lengths)
    if longest == 0:
        return [b""] * len(lengths)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, _as_tensor(data, longest), group=group)
    return [_as_bytes(part, length) for part, length in zip(parts, lengths, strict=True)]


def gathered_bytes_on_zero(data: bytes, group: ProcessGroup | None) -> list[bytes] | None:
    """The bytes of all ranks, by rank, on rank 0; None on the others."""
    if group is None:
        return [data]
    lengths = gathered_ints(len(data), group)
    longest = max(lengths)
    if dist.get_rank() != 0:
        dist.gather(_as_tensor(data, longest), None, dst=0, group=group)
        return None
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.gather(_as_tensor(data, longest), parts, dst=0, group=group)
    return [_as_bytes(part, length) for part, length in zip(parts, lengths, strict=True)]


def scattered_bytes(parts: Sequence[bytes] | None, group: ProcessGroup | None) -> bytes:
    """This rank's part of rank 0's `parts`, which has bytes for each rank; None on others."""
    if group is None:
        assert parts is not None, "the only rank is rank 0"
        return parts[0]
    lengths = torch.tensor([len(part) for part in parts or [b""] * group.size()])
    dist.broadcast(lengths, 0, group=group)
    longest = int(lengths.max())
    received = torch.empty(longest, dtype=torch.uint8)
    padded = None if parts is None else [_as_tensor(part, longest) for part in parts]
    dist.scatter(received, padded, src=0, group=group)
    return _as_bytes(received, int(lengths[dist.get_rank()]))


def broadcast_bytes(data: bytes, src: int, group: ProcessGroup | None) -> bytes:
    """The bytes of rank `src`; `data` of other ranks is ignored."""
    if group is None:
        return data
    is_source = dist.get_rank() == src
    length = torch.tensor([len(data)])
    dist.broadcast(length, src, group=group)
    sent = _as_tensor(data if is_source else b"", int(length))
    dist.broadcast(sent, src, group=group)
    return data if is_source else _as_bytes(sent, int(length))


def gathered_objects(value: Any, group: ProcessGroup | None) -> list[Any]:
    """The picklable objects of all ranks, by rank."""
    if group is None:
        return [value]
    # From this run's own ranks, which run the same code.
    return [pickle.loads(data) for data in gathered_bytes(pickle.dumps(value), group)]  # noqa: S301


def gathered_objects_on_zero(value: Any, group: ProcessGroup | None) -> list[Any] | None:
    """The picklable objects of all ranks, by rank, on rank 0; None on the others."""
    if group is None:
        return [value]
    parts = gathered_bytes_on_zero(pickle.dumps(value), group)
    return None if parts is None else [pickle.loads(data) for data in parts]  # noqa: S301


def broadcast_object(value: Any, src: int, group: ProcessGroup | None) -> Any:
    """The picklable object of rank `src`; `value` of other ranks is ignored."""
    if group is None:
        return value
    is_source = dist.get_rank() == src
    data = broadcast_bytes(pickle.dumps(value) if is_source else b"", src, group)
    return value if is_source else pickle.loads(data)  # noqa: S301


def _as_tensor(data: bytes, num_bytes: int) -> Tensor:
    """The data as a tensor of `num_bytes` bytes, padded with zeros."""
    tensor = torch.empty(num_bytes, dtype=torch.uint8)
    ctypes.memmove(tensor.data_ptr(), data, len(data))
    tensor[len(data) :] = 0
    return tensor


def _as_bytes(tensor: Tensor, num_bytes: int) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), num_bytes)
