"""GradientSteps: the methods of a trainer that `training_step` calls, from loss to weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer import optimizer_modes
from dream_trainer.trainer.epoch_schedules import schedulers_by_step
from dream_trainer.trainer.loss_scaling import LossScale
from dream_trainer.trainer.optimization import Optimization
from dream_trainer.world import torch_private
from dream_trainer.world.replica_gradients import ReplicaGradients


class GradientSteps(AbstractTrainer):
    """Backward, clipping and the optimizer step."""

    optimization: Optimization
    training_parameters: TrainingParameters
    precision_context: Callable[[], AbstractContextManager[Any]] | None = None
    training_step: Callable[..., Any]
    replica_gradients: ReplicaGradients | None = None

    def backward(
        self, loss: Tensor, *, denominator: float | Tensor | None = None, **options: Any
    ) -> None:
        """`loss.backward()`, scaled so that the gradients of a step's batches sum to their mean.

        With a denominator, the gradient of a step is the sum over its batches and data-parallel
        ranks, divided by the sum of their denominators: that of one large batch, whatever the
        number of tokens in each. `step` divides once. No host synchronization.

        Runs outside of the loop's autocast. Collective with the last batch of a step.

        Args:
            loss: Scalar `()`: a mean, or with `denominator` a sum.
            denominator: What `loss` would be divided by to be the mean of this batch on this rank:
                valid tokens, pixels, nodes; a number or a tensor with one element. If no batch of
                a step has any, its gradient is zero.
            **options: Of `Tensor.backward`, such as `retain_graph`.

        Raises:
            ValueError: If some batches of a step have a denominator and others none.
            RuntimeError: With several optimizers, if it adds to gradients that were left when
                another optimizer stepped.
        """
        self._backward(loss, denominator, **options)

    def step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None) -> Tensor | None:
        """Clip, step, zero the gradients, step the schedulers. No host synchronization.

        Runs outside of autocast; a forward after it, in the same `training_step`, uses the new
        weights. Gradients of a model are clipped together and once, however many of its optimizers
        step.

        Call it only on the last batch of a step: `if not self.is_accumulating_gradients`.
        Collective where parameters are sharded.

        Args:
            optimizer: One of `configure_optimizers`.
            closure: For optimizers that evaluate the loss themselves, such as LBFGS: computes the
                loss, calls `self.backward(loss)` and returns the loss. Gradients are zeroed before
                and clipped after each evaluation, which runs in the autocast of `training_step`.

        Returns:
            With `gradient_clip_val`, the norm of the gradients before clipping (with a closure,
            those of its last evaluation): scalar `()`, equal on all ranks. Otherwise None.
        """
        return self._optimizer_step(optimizer, self.callbacks, closure)

    def clip_gradients(self, model: nn.Module) -> Tensor | None:
        """Clip the gradients of a model. Optional to override; then `step` always calls it.

        `step` calls it once per step, before `pre_optimizer_step`. `training_step` may call the
        default itself, after `backward`, to look at the norm before it decides to step; `step`
        doesn't clip again. Collective where parameters are sharded.

        Args:
            model: One of `configure_models`; a ModuleDict of those that share an optimizer.

        Returns:
            What `step` returns; by default the L2 norm of all gradients of the model before
            clipping, scalar `()`, equal on all ranks.
        """
        return self.optimization.finish.clip(model)

    def toggled(self, optimizer: Optimizer) -> AbstractContextManager[None]:
        """Inside, only the parameters of one optimizer require and get gradients.

        For several optimizers, around the forward and the backward of a loss that is meant for one
        of them: the generator's loss then leaves no gradients in the discriminator, which passes
        gradients on. Under DDP, the first `backward` inside is collective.

        Raises:
            RuntimeError: Inside another one.
        """
        return self.optimization.toggled(optimizer)

    @property
    def is_accumulating_gradients(self) -> bool:
        return self.optimization.is_accumulating

    @property
    def loss_scale(self) -> Tensor | None:
        """Factor of the loss with `param_dtype=torch.float16`: scalar `()`, equal on all ranks.

        None in other dtypes. It halves when gradients overflow; that step is skipped on all ranks,
        without hooks and schedulers, and doesn't count. It doubles after 2000 steps in a row. One
        host sync per step, as with torch.amp.GradScaler.
        """
        scale = self.optimization.loss_scale
        return None if scale is None else scale.scale

    def build_optimization(self) -> None:
        """Create what turns gradients into steps, from models, optimizers and schedulers.

        Raises:
            TypeError: If the trainer has a GradScaler.
        """
        for name, value in vars(self).items():
            if isinstance(value, torch.amp.GradScaler):
                raise TypeError(
                    f"self.{name} is a GradScaler, which doesn't see self.step; remove it and set "
                    "param_dtype=torch.float16: self.backward and self.step scale the loss and "
                    "skip steps that overflow"
                )
        optimizer_modes.train(self.named_optimizers().values())
        parameters = self.config.device_parameters
        is_float16 = torch.float16 in (parameters.param_dtype, parameters.computes_in)
        clip = getattr(self.clip_gradients, "__func__", self.clip_gradients)
        overrides = clip is not GradientSteps.clip_gradients
        self.optimization = Optimization(
            self.named_models(),
            self.named_optimizers(),
            self.models_of,
            schedulers_by_step(self.named_schedules().values()),
            self.training_parameters,
            self.world,
            self.replica_gradients,
            clip_gradients=self.clip_gradients if overrides else None,
            autocasts=self.precision_context is not None,
            loss_scale=LossScale(self.world) if is_float16 else None,
        )
        self.optimization.warn_of_ownerless(after_step=False)
        self._backward, self._optimizer_step = self.optimization.backward, self.optimization.step
        if torch_private.is_compiled(self.training_step):
            # Else the optimizer and the hooks are compiled with it.
            self._optimizer_step = torch.compiler.disable(self.optimization.step)
            self._backward = torch.compiler.disable(self.optimization.backward)
