"""Switches of a model's gradient synchronization, for accumulation."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def setters(model: nn.Module, reduces_every_batch: bool) -> list[Callable[[bool], None]]:
    """Functions that switch a model's gradient synchronization on and off.

    With `reduces_every_batch` FSDP always reduces gradients over shards; what is switched is the
    all-reduce over replicas of the shards (HSDP).
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):

        def set_ddp(requires_sync: bool) -> None:
            model.require_backward_grad_sync = requires_sync

        return [set_ddp]
    # torch's composable replicate and fully_shard give the module this method.
    found = [getattr(module, "set_requires_gradient_sync", None) for module in model.modules()]
    if reduces_every_batch:
        of_fsdp = [getattr(module, "set_requires_all_reduce", None) for module in model.modules()]
        found = [mine or other for mine, other in zip(of_fsdp, found, strict=True)]
    return [setter for setter in found if callable(setter)]
