"""How gradients become weights: scaling, accumulation, clipping, the optimizer step."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.trainer import closures, gradient_sync, stray_gradients, toggling
from dream_trainer.trainer.closures import Closure
from dream_trainer.trainer.gradient_finish import GradientFinish
from dream_trainer.trainer.gradient_group import Update, grouped
from dream_trainer.trainer.loss_scaling import LossScale
from dream_trainer.world import torch_private

if TYPE_CHECKING:
    from dream_trainer.callbacks.collection import CallbackCollection
    from dream_trainer.configs.training import TrainingParameters
    from dream_trainer.world.replica_gradients import ReplicaGradients
    from dream_trainer.world.world import World

logger = logging.getLogger(__name__)


class Optimization:
    """Turns the gradients of a group of batches into one optimizer step.

    `backward` and `step` turn off the loop's autocast, and `step` any other: only the
    forward is meant to run in low precision, not the products inside an optimizer such as Shampoo
    or Muon.

    Args:
        models: All models; their gradient synchronization is off while gradients accumulate.
        optimizers: By name.
        models_of: The models that an optimizer updates, by name.
        schedulers: Those that are stepped after each step of an optimizer, in order.
        parameters: Clipping and accumulation.
        world: Ranks over which gradients are averaged.
        replicas: Averages gradients over the replicas of the models, with DDP.
        clip_gradients: The trainer's method, if the user has written one.
        autocasts: Whether the loop calls `training_step` inside autocast.
        loss_scale: For float16.

    Attributes:
        groups: Gradients that are clipped together.
        loss_scale: As passed.
        finish: Scales and clips gradients between backward and step.
        num_steps: The largest number of steps of one optimizer in this batch.
        has_skipped: Whether a step was skipped in this batch, because gradients weren't finite.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        models_of: Callable[[Optimizer], Mapping[str, nn.Module]],
        schedulers: Mapping[Optimizer, Sequence[LRScheduler]],
        parameters: TrainingParameters,
        world: World,
        replicas: ReplicaGradients | None,
        *,
        clip_gradients: Callable[[nn.Module], Tensor | None] | None,
        autocasts: bool,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.is_accumulating = False
        self.group_size = 1
        self.num_steps = 0
        self._parameters = parameters
        self._world = world
        self._replicas = replicas
        self._models = models
        self._device_type = world.device.type
        self._autocasts = autocasts
        self.loss_scale = loss_scale
        self.has_skipped = False
        names = {name: tuple(models_of(each)) for name, each in optimizers.items()}
        group_of = grouped(models, names.values())
        self.groups = list(dict.fromkeys(group_of.values()))
        self.finish = GradientFinish(
            {models[name]: group for name, group in group_of.items()},
            parameters,
            world,
            clip_gradients=clip_gradients,
            loss_scale=loss_scale,
        )
        self._trained = {models[name] for name in group_of}
        self._updates: dict[Optimizer, Update] = {}
        for name, optimizer in optimizers.items():
            first = names[name][0]
            own = tuple(schedulers.get(optimizer, ()))
            update = Update(name, optimizer, models[first], group_of[first], own)
            self._updates[optimizer] = update
            update.group.add(update)
        self._has_several = len(self._updates) > 1
        self._set_gradient_sync = [
            setter
            for model in models.values()
            for setter in gradient_sync.setters(model, world.parameters.reduce_every_batch)
        ]
        self._syncs_gradients = True
        self._reduces_late = replicas is not None or bool(self._set_gradient_sync)
        self._index_in_group = 0
        self._has_backward = False
        self._toggled: Update | None = None
        self._has_warned = False

    def begin_batch(self, index_in_group: int, group_size: int) -> None:
        """Prepare for one of the `group_size` batches of a step."""
        if index_in_group == 0:  # the gradients of the batches before must outlive the next replay
            torch_private.mark_cudagraph_step()
            self._has_backward = False
        self.group_size = group_size
        self._index_in_group = index_in_group
        self.finish.generation += 1
        self.num_steps = 0
        self.has_skipped = False
        for update in self._updates.values():
            update.num_steps, update.has_backward = 0, False
        self.is_accumulating = index_in_group + 1 < group_size
        if self._replicas is not None and group_size != 1 and not self.is_accumulating:
            self._replicas.begin_last_batch()
        if self.is_accumulating is self._syncs_gradients and self._set_gradient_sync:
            self._syncs_gradients = not self.is_accumulating
            for set_gradient_sync in self._set_gradient_sync:
                set_gradient_sync(self._syncs_gradients)

    def backward(
        self, loss: Tensor, denominator: float | Tensor | None = None, **options: Any
    ) -> None:
        """Compute the gradients of a batch's loss: a mean, or a sum with its denominator.

        A mean is divided by the number of batches of the step.
        """
        self.finish.generation += 1
        self._has_backward = True
        if denominator is not None:
            denominator = _checked(denominator)
        elif self.group_size != 1:
            loss = loss / self.group_size
        if self._has_several:
            left = self._before_one_of_several(denominator)
        else:
            group = self.groups[0]
            if denominator is not None or group.denominator is not None:
                group.weigh(denominator, may_be_zeroed=self._index_in_group == 0)
            group.is_pending = True
            left = None
        if self.loss_scale is not None:
            loss = self._scaled(self.loss_scale, loss)
        replicas = None if self.is_accumulating else self._replicas
        if replicas is not None:
            replicas.prepare()
        if self._autocasts:
            with torch.autocast(self._device_type, enabled=False):
                loss.backward(**options)
        else:
            loss.backward(**options)
        if replicas is not None:
            replicas.finish()
        if left:
            stray_gradients.refuse_additions(left)

    def step(
        self,
        optimizer: Optimizer,
        callbacks: CallbackCollection,
        closure: Closure | None = None,
    ) -> Tensor | None:
        """Clip, step, zero, step the schedulers, with the hooks.

        A forward after it in the same `training_step` uses the new weights, also inside autocast.
        Collective where parameters are sharded. No host synchronization.

        Returns:
            Norm of the gradients before clipping, scalar `()`, equal on all ranks; None if
            gradients aren't clipped.

        Raises:
            RuntimeError: While gradients accumulate, or if no backward came before.
            ValueError: If the optimizer isn't one of the trainer's.
            TypeError: If it needs a closure.
        """
        if self.is_accumulating:
            raise RuntimeError(
                "step() was called on a batch whose gradient is still accumulating "
                f"({self.group_size} batches make a step); write "
                "`if not self.is_accumulating_gradients: self.step(optimizer)`"
            )
        update = self._updates.get(optimizer)
        if update is None:
            raise _unknown(optimizer)
        if self._autocasts or torch.is_autocast_enabled(self._device_type):
            if closure is not None:
                closure = closures.in_autocast(closure, self._device_type)
            with torch.autocast(self._device_type, enabled=False):
                norm = self._step(update, optimizer, callbacks, closure)
            # A region that is still open has low-precision copies of the old weights.
            torch.clear_autocast_cache()
            return norm
        return self._step(update, optimizer, callbacks, closure)

    def _step(
        self,
        update: Update,
        optimizer: Optimizer,
        callbacks: CallbackCollection,
        closure: Closure | None,
    ) -> Tensor | None:
        norm, group, model = None, update.group, update.model
        if closure is not None:
            evaluate = self._evaluation(update, closure)
            callbacks.pre_optimizer_step(model, optimizer)
            optimizer.step(evaluate)
            norm = group.norm
        else:
            if update.needs_closure:
                raise closures.needs_closure(update)
            if not self._has_backward:
                stray_gradients.require_gradient(update, self._updates.values())
            if self._reduces_late and self.group_size != 1:
                stray_gradients.refuse_unreduced(update, self._replicas)
            if self.finish.is_always_needed or group.denominator is not None:
                if self._has_several and self.group_size != 1:
                    stray_gradients.refuse_incomplete(update)
                norm = self.finish.of(group, update)
                if group.overflow is not None and self._skips(update, group.overflow):
                    return norm
            callbacks.pre_optimizer_step(model, optimizer)
            if group.is_sharded:
                group.reshard()
            optimizer.step()
        callbacks.post_optimizer_step(model, optimizer)
        callbacks.pre_optimizer_zero_grad(model, optimizer)
        update.zero_grad()
        if group.ownerless:
            group.zero_ownerless()
        callbacks.post_optimizer_zero_grad(model, optimizer)
        for scheduler in update.schedulers:
            scheduler.step()
        update.num_steps += 1
        if update.num_steps > self.num_steps:
            self.num_steps = update.num_steps
        self._end_step(update)
        return norm

    def _end_step(self, update: Update) -> None:
        update.generation = self.finish.generation
        update.group.is_pending = update.is_pending = update.is_stale = False
        if self._has_several:
            for other in self._updates.values():
                other.is_stale = other.is_pending

    def _scaled(self, loss_scale: LossScale, loss: Tensor) -> Tensor:
        if loss_scale.has_stepped and not any(u.is_pending for u in self._updates.values()):
            loss_scale.update()  # gradients that are pending have the scale as it was
        self._note_pending()
        return loss.float() * loss_scale.scale

    def _note_pending(self) -> None:
        for update in self._updates.values() if self._toggled is None else (self._toggled,):
            update.is_pending = update.has_backward = True

    def _skips(self, update: Update, overflow: Tensor) -> bool:
        """Skip a step if gradients aren't finite, without hooks and schedulers. Host sync."""
        assert self.loss_scale is not None, "it made the overflow"
        if not self.loss_scale.skips(overflow):
            return False
        self.has_skipped = True
        update.zero_grad()
        self._end_step(update)
        return True

    def _evaluation(self, update: Update, closure: Closure) -> Closure:
        if self.loss_scale is not None:
            raise RuntimeError(
                f"step({update.name}, closure) with param_dtype=torch.float16: an optimizer that "
                "evaluates the loss itself can't skip a step that overflows; use torch.bfloat16"
            )
        num_accumulated = self._parameters.gradient_accumulation_steps
        return closures.evaluation(update, closure, self.finish, num_accumulated)

    # Several optimizers

    @contextmanager
    def toggled(self, optimizer: Optimizer) -> Iterator[None]:
        """Inside, only the parameters of an optimizer require gradients."""
        update = self._updates.get(optimizer)
        if update is None:
            raise _unknown(optimizer)
        if self._toggled is not None:
            raise RuntimeError(
                f"toggled({update.name}) inside toggled({self._toggled.name}); leave the outer one "
                "first, or put the parameters of both into one optimizer"
            )
        owned = [each.parameters for each in self._updates.values()]
        with toggling.only(update, self._models, owned):
            self._toggled = update
            try:
                yield
            finally:
                self._toggled = None

    def _before_one_of_several(self, denominator: float | Tensor | None) -> list[Any]:
        """Count a denominator; set gradients aside that another optimizer's step has left."""
        toggled = self._toggled
        others = [update for update in self._updates.values() if update is not toggled]
        if self._index_in_group > 0:
            stray_gradients.refuse_unsharded(others)
        left = stray_gradients.set_aside(others, copies=self._replicas is not None)
        for group in self.groups if toggled is None else (toggled.group,):
            if denominator is not None or group.denominator is not None:
                group.weigh(denominator, may_be_zeroed=self._index_in_group == 0)
            group.is_pending = True
        if self.loss_scale is None:
            self._note_pending()
        return left

    # Between steps

    def end_group(self) -> None:
        """After the batches of a step in which no optimizer stepped: drop what they accumulated."""
        if (
            self._parameters.gradient_accumulation_steps == 1
            or not self._has_backward
            or self.has_skipped
        ):
            return  # a rule of the user's own for accumulation may be at work
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "a group of %d batches ended without self.step(optimizer), so its gradients are "
                "dropped. For an accumulation rule of your own, set gradient_accumulation_steps=1",
                self.group_size,
            )
        for update in self._updates.values():
            update.zero_grad()
            update.is_pending = update.is_stale = False
        for group in self.groups:
            group.zero_ownerless()
            group.forget()
        for model in self._models.values():
            torch_private.drop_unsharded_gradients(model)

    def has_gradients(self) -> bool:
        """Whether a parameter of an optimizer has a gradient."""
        return any(p.grad is not None for u in self._updates.values() for p in u.parameters)

    def warn_of_ownerless(self, *, after_step: bool) -> None:
        """Warn of trainable parameters that no optimizer has, before or after the first step."""
        if self._world.is_global_zero:
            stray_gradients.warn_of_ownerless(
                self._models, self._trained, self._updates.values(), after_step=after_step
            )


def _checked(denominator: float | Tensor) -> float | Tensor:
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(
                f"backward(loss, denominator=…) of shape {tuple(denominator.shape)}; one number "
                "is required: the sum over the batch, such as (y != -100).sum()"
            )
        return denominator.detach()
    if not 0 <= denominator < math.inf:
        raise ValueError(
            f"backward(loss, denominator={denominator!r}): a number of at least 0 is required"
        )
    return denominator


def _unknown(optimizer: object) -> ValueError:
    return ValueError(
        f"{type(optimizer).__name__} at {id(optimizer):#x} isn't an optimizer of this trainer; "
        "assign it to an attribute in configure_optimizers, or return it there"
    )
