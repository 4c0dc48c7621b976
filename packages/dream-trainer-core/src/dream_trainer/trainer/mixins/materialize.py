"""Materialize: memory for meta tensors, a check that they got values, the device of buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn


def is_on_meta(model: nn.Module) -> bool:
    """Whether any parameter or buffer is on the meta device."""
    return any(tensor.is_meta for _, tensor in _tensors(model))


def allocate(model: nn.Module, device: torch.device) -> set[str]:
    """Allocate all parameters and buffers on a device, and mark them as being without values.

    Returns:
        Their names.
    """
    model.to_empty(device=device)
    names = set()
    for name, tensor in _tensors(model):
        _mark_empty(tensor)
        names.add(name)
    return names


def still_empty(model: nn.Module, names: Collection[str]) -> list[str]:
    """Those of `names`, from `allocate`, that nothing has been written to since. Host sync."""
    # The tensors may be others by now: init_weights may assign new buffers.
    return [name for name, t in _tensors(model) if name in names and _is_marked_empty(t)]


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move all buffers to a device; parameters stay where they are."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if buffer.device != device:
                setattr(module, name, buffer.to(device))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    from torch.distributed.tensor import DTensor

    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _mark_empty(tensor: Tensor) -> None:
    local = _local(tensor)
    if local.is_floating_point() or local.is_complex():
        local.fill_(float("nan"))
    elif local.dtype is not torch.bool:
        local.fill_(torch.iinfo(local.dtype).min)


def _is_marked_empty(tensor: Tensor) -> bool:
    """Whether nothing was written since `_mark_empty`; always False for booleans."""
    local = _local(tensor)
    if local.numel() == 0 or local.dtype is torch.bool:
        return False
    if local.is_floating_point() or local.is_complex():
        return bool(local.isnan().any())
    return local.dtype is not torch.uint8 and bool((local == torch.iinfo(local.dtype).min).all())
