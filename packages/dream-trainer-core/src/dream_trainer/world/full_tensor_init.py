"""FullTensorInit: initial weights of sharded models that don't depend on the layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dream_trainer.world.dtensors import is_dtensor
from dream_trainer.world.torch_private import TorchDispatchMode

_NEW_TENSOR = {f"aten::new_{name}" for name in ("empty", "empty_strided", "zeros", "ones", "full")}


class FullTensorInit(TorchDispatchMode):
    """Initializes sharded tensors as if they were whole, with the same values in every layout.

    Otherwise `nn.init` gives each rank of a CPU mesh the same shard, since all have the same seed,
    and weights depend on the layout on any device. Here each rank draws the full tensor and keeps
    its shard. What DTensor can't do to a shard is done to the full tensor too: writing to a part
    of it (`weight[padding_idx].zero_()`), copying from a plain tensor, `nn.init.sparse_`.

    Collective where a tensor is gathered. Memory: one full tensor at a time.

    Args:
        device: Device to draw on; generators of different devices give different numbers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._device = device
        self._parts: list[_Part] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        target = kwargs.get("out", first)
        if not (_has_sharded((args, kwargs)) or self._is_part(target)):
            return func(*args, **kwargs)
        if func.is_view:
            return self._viewed(func, first, args, kwargs)
        if func._schema.is_mutable:  # noqa: SLF001
            result = self._changed(func, target, args, kwargs)
            self._write_back(target)
            return result
        if torch.Tag.nondeterministic_seeded in func.tags and is_dtensor(first):
            return _shard(func(self._empty_like(first), *args[1:], **kwargs), first)
        if func._schema.name in _NEW_TENSOR and first is not None:  # noqa: SLF001
            # A plain one: what follows, such as a QR decomposition, is known for these.
            return func(torch.empty(0, dtype=first.dtype, device=self._device), *args[1:], **kwargs)
        return self._as_full_if_needed(func, args, kwargs)

    def _viewed(self, func: Any, first: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            if not is_dtensor(first):
                raise
            result = func(first.full_tensor(), *args[1:], **kwargs)
        if self._is_part(first) or not _shares_memory(result, first):
            # sys.getrefcount counts its argument and the list's reference.
            self._parts = [each for each in self._parts if sys.getrefcount(each.tensor) > 2]
            parts = result if isinstance(result, (list, tuple)) else [result]
            for i, part in enumerate(parts):
                self._parts.append(_Part(part, first, func, args[1:], kwargs, i))
        return result

    def _changed(self, func: Any, target: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if not is_dtensor(target):
            return self._as_full_if_needed(func, args, kwargs)
        if not is_random and "out" not in kwargs and not _has_plain(args[1:]):
            try:
                return func(*args, **kwargs)
            except NotImplementedError:  # DTensor doesn't know this operation
                if torch.Tag.inplace_view in func.tags:
                    raise
        # A random operation fills all of it, so its values needn't be gathered.
        full = self._empty_like(target) if is_random else target.full_tensor().clone()
        func(*_full(args, target, full), **_full(kwargs, target, full))
        return _assign(target, full)

    def _as_full_if_needed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if not _has_plain((args, kwargs)):
            try:
                return func(*args, **kwargs)
            except NotImplementedError:
                pass
        return func(*_full(args), **_full(kwargs))

    def _empty_like(self, tensor: Any) -> torch.Tensor:
        shape, strides = tensor.shape, tensor.stride()
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=self._device)

    def _is_part(self, tensor: Any) -> bool:
        return any(each.tensor is tensor for each in self._parts)

    def _write_back(self, written: Any) -> None:
        """Write a part that is a copy back to the tensor that it was taken from."""
        for part in reversed(self._parts):
            if part.tensor is written:
                full = _full(part.base)
                taken = part.func(full, *part.args, **part.kwargs)
                taken = taken[part.index] if isinstance(taken, (list, tuple)) else taken
                taken.copy_(_full(written))
                if is_dtensor(part.base):
                    _assign(part.base, full)
                written = part.base


@dataclass(frozen=True)
class _Part:
    """A part of a sharded tensor that isn't a view of it but a copy, or a view of such a part."""

    tensor: Any
    base: Any
    func: Any
    args: Any
    kwargs: dict[str, Any]
    index: int


def _shard(full: torch.Tensor, like: Any) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _assign(target: Any, full: torch.Tensor) -> Any:
    target.to_local().copy_(_shard(full, target).to_local())
    return target


def _full(value: Any, target: Any = None, full: Any = None) -> Any:
    """The value with full tensors in place of sharded ones, and `full` in place of `target`."""
    if target is not None and value is target:
        return full
    if isinstance(value, dict):
        return {name: _full(each, target, full) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_full(each, target, full) for each in value)
    return value.full_tensor() if is_dtensor(value) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, torch.Tensor):
        yield value


def _has_sharded(value: Any) -> bool:
    return any(map(is_dtensor, _tensors(value)))


def _has_plain(value: Any) -> bool:
    """Whether an operation on sharded tensors gets a plain one, which DTensor refuses."""
    return any(each.ndim > 0 and not is_dtensor(each) for each in _tensors(value))


def _shares_memory(result: Any, source: Any) -> bool:
    """Whether what should be a view of a sharded tensor is one."""
    part = result[0] if isinstance(result, (list, tuple)) and result else result
    if not is_dtensor(part):
        return False
    of_part, of_source = part.to_local(), source.to_local()
    return bool(of_part.untyped_storage().data_ptr() == of_source.untyped_storage().data_ptr())
