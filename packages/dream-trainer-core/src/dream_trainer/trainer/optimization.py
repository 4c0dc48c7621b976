"""How gradients become weights: scaling, accumulation, clipping, the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.world import torch_private
from dream_trainer.world.gradient_clipping import clip_gradients, clip_sharded_gradients

if TYPE_CHECKING:
    from dream_trainer.callbacks.collection import CallbackCollection


class Optimization:
    """Turns the gradients of a group of batches into one optimizer step.

    `backward` and `step` turn off the autocast of `param_dtype`, and `step` any other: only the
    forward is meant to run in low precision, not the products inside an optimizer such as Shampoo
    or Muon.

    Args:
        models: All models; their gradient synchronization is off while gradients accumulate.
        model_of: The model of each optimizer.
        schedulers: Those that are stepped after each step of an optimizer, in order.
        clip_norm: Largest gradient norm per optimizer; None for no clipping.
        device_type: Device whose autocast is turned off.
        autocasts: Whether the loop calls `training_step` inside autocast.
        is_distributed: Whether gradients may be sharded over ranks.
        reduces_every_batch: Whether FSDP shards gradients of each batch while they accumulate.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        model_of: Mapping[Optimizer, nn.Module],
        schedulers: Mapping[Optimizer, Sequence[LRScheduler]],
        clip_norm: float | None,
        *,
        device_type: str,
        autocasts: bool,
        is_distributed: bool,
        reduces_every_batch: bool = False,
    ) -> None:
        self.is_accumulating = False
        self.group_size = 1
        self.num_steps = 0
        self.clip_norm = clip_norm
        self._device_type = device_type
        self._autocasts = autocasts
        self._clip = clip_sharded_gradients if is_distributed else clip_gradients
        self._model_of = model_of
        self._schedulers_of = {each: tuple(schedulers.get(each, ())) for each in model_of}
        self._set_gradient_sync = [
            setter
            for model in models.values()
            for setter in _gradient_sync_setters(model, reduces_every_batch)
        ]
        self._syncs_gradients = True

    def begin_batch(self, index_in_group: int, group_size: int) -> None:
        """Prepare for one of the `group_size` batches of a step."""
        if index_in_group == 0:  # the gradients of the batches before must outlive the next replay
            torch_private.mark_cudagraph_step()
        self.group_size = group_size
        self.is_accumulating = index_in_group + 1 < group_size
        if self.is_accumulating is self._syncs_gradients and self._set_gradient_sync:
            self._syncs_gradients = not self.is_accumulating
            for set_gradient_sync in self._set_gradient_sync:
                set_gradient_sync(self._syncs_gradients)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a batch's loss, divided by the number of batches of the step."""
        if self.group_size != 1:
            loss = loss / self.group_size
        if self._autocasts:
            with torch.autocast(self._device_type, enabled=False):
                loss.backward()
        else:
            loss.backward()

    def step(self, optimizer: Optimizer, callbacks: CallbackCollection) -> Tensor:
        """Clip, step, zero, step the schedulers, with the hooks.

        A forward after it in the same `training_step` uses the new weights, also inside autocast.
        Collective where parameters are sharded. No host synchronization.

        Returns:
            Norm of the gradients before clipping, scalar `()`, equal on all ranks.

        Raises:
            RuntimeError: While gradients accumulate.
            ValueError: If no parameter has a gradient, or the optimizer isn't one of the trainer's.
        """
        if self.is_accumulating:
            raise RuntimeError(
                "step() was called on a batch whose gradient is still accumulating "
                f"({self.group_size} batches make a step); write "
                "`if not self.is_accumulating_gradients: self.step(optimizer)`"
            )
        if self._autocasts or torch.is_autocast_enabled(self._device_type):
            with torch.autocast(self._device_type, enabled=False):
                norm = self._step(optimizer, callbacks)
            # A region that is still open has low-precision copies of the old weights.
            torch.clear_autocast_cache()
            return norm
        return self._step(optimizer, callbacks)

    def _step(self, optimizer: Optimizer, callbacks: CallbackCollection) -> Tensor:
        model = self._model_of.get(optimizer)
        if model is None:
            raise ValueError(
                f"{type(optimizer).__name__} at {id(optimizer):#x} isn't an optimizer of this "
                "trainer; assign it to an attribute in configure_optimizers, or return it there"
            )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = self._clip(parameters, self.clip_norm)
        callbacks.pre_optimizer_step(model, optimizer)
        optimizer.step()
        callbacks.post_optimizer_step(model, optimizer)
        callbacks.pre_optimizer_zero_grad(model, optimizer)
        _zero_grad(optimizer)
        callbacks.post_optimizer_zero_grad(model, optimizer)
        for scheduler in self._schedulers_of[optimizer]:
            scheduler.step()
        self.num_steps += 1
        return norm


_TORCHS_ZERO_GRAD = Optimizer.zero_grad


def _zero_grad(optimizer: Optimizer) -> None:
    """Set gradients to None, or call the optimizer's own `zero_grad` if it has one.

    Torch's `Optimizer.zero_grad` does the same inside a `record_function`, which takes 9 µs.
    """
    if type(optimizer).zero_grad is not _TORCHS_ZERO_GRAD or "zero_grad" in vars(optimizer):
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _gradient_sync_setters(
    model: nn.Module, reduces_every_batch: bool
) -> list[Callable[[bool], None]]:
    """Functions that switch a model's gradient synchronization on and off.

    With `reduces_every_batch` FSDP always reduces gradients over shards; what is switched is the
    all-reduce over replicas of the shards (HSDP).
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):

        def set_ddp(requires_sync: bool) -> None:
            model.require_backward_grad_sync = requires_sync

        return [set_ddp]
    # torch's composable replicate and fully_shard give the module this method.
    setters = [getattr(module, "set_requires_gradient_sync", None) for module in model.modules()]
    if reduces_every_batch:
        of_fsdp = [getattr(module, "set_requires_all_reduce", None) for module in model.modules()]
        setters = [mine or other for mine, other in zip(of_fsdp, setters, strict=True)]
    return [setter for setter in setters if callable(setter)]
