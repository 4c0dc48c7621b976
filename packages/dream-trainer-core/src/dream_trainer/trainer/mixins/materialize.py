"""Materialize: memory for meta tensors, a check that they got values, the device of buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from dream_trainer.world.dtensors import local_part


def has_meta_tensors(model: nn.Module) -> bool:
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


def _mark_empty(tensor: Tensor) -> None:
    local = local_part(tensor).detach()
    if local.is_floating_point() or local.is_complex():
        local.fill_(float("nan"))
    elif local.dtype is not torch.bool:
        local.fill_(torch.iinfo(local.dtype).min)


def _is_marked_empty(tensor: Tensor) -> bool:
    """Whether values are missing since `_mark_empty`; always False for booleans and uint8.

    Of floats a single NaN counts: a part of the tensor may not have been written.
    """
    local = local_part(tensor).detach()
    if local.numel() == 0 or local.dtype is torch.bool:
        return False
    if local.is_floating_point() or local.is_complex():
        return bool(local.isnan().any())
    return local.dtype is not torch.uint8 and bool((local == torch.iinfo(local.dtype).min).all())
