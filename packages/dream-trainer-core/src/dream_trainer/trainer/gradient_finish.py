"""Between backward and step: unscaling, dividing by denominators, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dream_trainer.world import gradient_clipping

if TYPE_CHECKING:
    from dream_trainer.configs.training import TrainingParameters
    from dream_trainer.trainer.gradient_group import GradientGroup, Update
    from dream_trainer.trainer.loss_scaling import LossScale
    from dream_trainer.world.world import World


class GradientFinish:
    """Makes the gradients of a group those that its optimizers use, once per step.

    Args:
        group_of: The group of each model that has one.
        parameters: Clipping.
        world: Ranks over which gradients are averaged.
        clip_gradients: The trainer's method, if the user has written one.
        loss_scale: For float16.

    Attributes:
        generation: Number of the last backward; whoever calls one increments it.
        clips: Whether gradients are clipped or measured.
        is_always_needed: Whether `of` is needed for groups without denominators.
    """

    def __init__(
        self,
        group_of: Mapping[nn.Module, GradientGroup],
        parameters: TrainingParameters,
        world: World,
        *,
        clip_gradients: Callable[[nn.Module], Tensor | None] | None,
        loss_scale: LossScale | None,
    ) -> None:
        self.generation = 0
        self.clips = clip_gradients is not None or parameters.gradient_clip_val is not None
        self.is_always_needed = self.clips or loss_scale is not None
        self._group_of = group_of
        self._parameters = parameters
        self._world = world
        self._clip_gradients = clip_gradients or self.clip
        self._loss_scale = loss_scale

    def of(self, group: GradientGroup, update: Update) -> Tensor | None:
        """Finish the gradients of a group, unless that was done since the last backward.

        An optimizer that has stepped since then has other gradients than those: of a backward that
        wasn't counted, torch's own.

        Returns:
            Their norm before clipping; None if they aren't clipped.
        """
        if group.generation != self.generation or update.generation == self.generation:
            self._unscale(group)
            if self.clips:
                group.norm = self._clip_gradients(group.model)
        return group.norm

    def clip(self, model: nn.Module) -> Tensor:
        """Clip the gradients of a model, and of those that share an optimizer with it, once.

        Returns:
            Their norm before clipping.
        """
        group = self._group_of.get(model) or next(
            (each for each in self._group_of.values() if each.model is model), None
        )
        if group is None:
            raise ValueError(
                f"clip_gradients was given a {type(model).__name__} that no optimizer of this "
                "trainer updates; give it one of the models of configure_models"
            )
        if group.generation != self.generation:
            self._unscale(group)
        limit = self._parameters.gradient_clip_val
        gradients = gradient_clipping.gradients_of(group.parameters)
        group.norm = norm = gradient_clipping.total_norm(gradients)
        if limit is None or limit == math.inf:
            return norm
        if self._parameters.gradient_clip_algorithm == "value":
            gradient_clipping.clip_value(group.parameters, limit)
        else:
            gradient_clipping.clip_norm(gradients, limit, norm)
        return norm

    def _unscale(self, group: GradientGroup) -> None:
        """Divide by the loss scale, and sums by the mean over ranks of their denominators.

        The mean, since gradients are means over ranks.
        """
        group.generation, group.norm = self.generation, None
        if self._loss_scale is not None:
            gradients = gradient_clipping.gradients_of(group.parameters)
            group.overflow = self._loss_scale.unscale(gradients)
        if (denominator := group.denominator) is None:
            return
        group.denominator = None
        if isinstance(denominator, Tensor):
            total = denominator.to(self._world.device, torch.float32, non_blocking=True).reshape(())
        else:
            total = torch.full((), denominator, device=self._world.device, dtype=torch.float32)
        total = self._world.all_reduce(total, "mean")
        # No token on any rank: the sums are zero, and so is the gradient.
        factor = torch.where(total > 0, 1 / total, 0.0)
        gradient_clipping.scale(gradient_clipping.gradients_of(group.parameters), factor)
