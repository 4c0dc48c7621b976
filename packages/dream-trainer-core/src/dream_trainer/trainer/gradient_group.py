"""GradientGroup: the gradients of models that share optimizers, and the optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dream_trainer.world import torch_private

_TORCHS_ZERO_GRAD = Optimizer.zero_grad


class Update:
    """An optimizer, with what belongs to it.

    Args:
        name: Of the optimizer.
        optimizer: The optimizer.
        model: Passed to the optimizer's hooks.
        group: The gradients that are clipped together with its own.
        schedulers: Stepped after it.

    Attributes:
        num_steps: Steps in this batch.
        generation: Number of the last backward before its last step.
        is_pending: Whether a backward came after its last step.
        is_stale: Whether another optimizer has stepped since that backward.
        has_backward: With several optimizers, whether it had a backward in this batch.
    """

    def __init__(
        self,
        name: str,
        optimizer: Optimizer,
        model: nn.Module,
        group: GradientGroup,
        schedulers: Sequence[Any],
    ) -> None:
        self.name = name
        self.optimizer = optimizer
        self.model = model
        self.group = group
        self.schedulers = schedulers
        self.num_steps = 0
        self.generation = -1
        self.is_pending = False
        self.is_stale = False
        self.has_backward = False
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        self.needs_closure = closure is not None and closure.default is inspect.Parameter.empty

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def has_own_zero_grad(self) -> bool:
        optimizer = self.optimizer
        return type(optimizer).zero_grad is not _TORCHS_ZERO_GRAD or "zero_grad" in vars(optimizer)

    def zero_grad(self) -> None:
        """Set gradients to None, or call the optimizer's own `zero_grad` if it has one.

        Torch's `Optimizer.zero_grad` does the same inside a `record_function`, which takes 9 µs.
        """
        if self.has_own_zero_grad:
            self.optimizer.zero_grad()
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class GradientGroup:
    """The gradients of models that share optimizers: scaled and clipped together, once per step.

    Args:
        models: By name.

    Attributes:
        is_sharded: Whether FSDP shards a part of them.
        model: The model; a ModuleDict if there are several.
        updates: The optimizers of the models.
        ownerless: Trainable parameters of the models that no optimizer has.
        denominator: Sum of this rank's denominators since the last step; None without.
        generation: Number of the last backward whose gradients have been scaled and clipped.
        norm: Their norm before clipping.
        overflow: With a loss scale, above 0 if they aren't finite on some rank.
        is_pending: Whether a backward came after the last step of any of the optimizers.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.models = dict(models)
        one = len(self.models) == 1
        self.model = next(iter(models.values())) if one else nn.ModuleDict(self.models)
        # Now that they are sharded: a forward without gradients may leave others in their place.
        self._ordered = list(self.model.parameters())
        self._known = {id(parameter) for parameter in self._ordered}
        self._fsdp_modules = torch_private.fsdp_modules(self.model)
        self.is_sharded = bool(self._fsdp_modules)
        self._num_groups = 0
        self.updates: list[Update] = []
        self.ownerless: list[nn.Parameter] = []
        self.denominator: float | Tensor | None = None
        self.generation = -1
        self.norm: Tensor | None = None
        self.overflow: Tensor | None = None
        self.is_pending = False

    def add(self, update: Update) -> None:
        """Add one of the optimizers of the models."""
        self.updates.append(update)
        self._find_owners()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """In the order of `model.parameters()`; then those that optimizers have got elsewhere."""
        self._find_owners()
        return self._ordered

    def _find_owners(self) -> None:
        num_groups = sum(len(update.optimizer.param_groups) for update in self.updates)
        if num_groups == self._num_groups:
            return  # no callback has added one
        self._num_groups = num_groups
        owned = {id(p): p for update in self.updates for p in update.parameters}
        self._ordered += [p for key, p in owned.items() if key not in self._known]
        self._known |= owned.keys()
        self.ownerless = [p for p in self._ordered if p.requires_grad and id(p) not in owned]

    def has_gradients(self) -> bool:
        """Whether any parameter has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def zero_ownerless(self) -> None:
        """Drop the gradients that no optimizer zeroes: they count in the norm of one step."""
        self._find_owners()
        for parameter in self.ownerless:
            parameter.grad = None

    def reshard(self) -> None:
        """Before an optimizer step: free what FSDP has gathered since the backward.

        A forward without gradients leaves parameters gathered; the next one would use these.
        """
        for module in self._fsdp_modules:
            module.reshard()

    def forget(self) -> None:
        """Begin a new step."""
        self.denominator, self.is_pending = None, False

    def weigh(self, denominator: float | Tensor | None, *, may_be_zeroed: bool) -> None:
        """Count the denominator of a backward; None if it has none.

        Args:
            denominator: A number or a detached tensor.
            may_be_zeroed: Whether parameters without gradients mean that those of earlier batches
                were dropped; they may also be held unsharded, or on their way.

        Raises:
            ValueError: If the step has a backward of the other kind already.
        """
        if self.is_pending and may_be_zeroed and not self.has_gradients():
            self.forget()
        if self.is_pending and (denominator is None) is not (self.denominator is None):
            raise ValueError(
                f"a step of {', '.join(self.models)} has a backward with a denominator and one "
                "without; give one to all of them: a mean over n tokens counts as a sum with "
                "self.backward(mean * n, denominator=n)"
            )
        if denominator is not None:
            counted = self.denominator
            self.denominator = denominator if counted is None else counted + denominator


def grouped(
    models: Mapping[str, nn.Module], models_of: Iterable[Iterable[str]]
) -> dict[str, GradientGroup]:
    """Put models that share an optimizer, also indirectly, into one group.

    Args:
        models: By name; those without an optimizer get no group.
        models_of: Names of the models of each optimizer.

    Returns:
        The group of each model, by the model's name.
    """
    together: list[set[str]] = []
    for names in models_of:
        touching = [part for part in together if part & set(names)]
        together = [part for part in together if part not in touching]
        together.append(set(names).union(*touching))
    groups: dict[str, GradientGroup] = {}
    for part in together:
        group = GradientGroup({name: model for name, model in models.items() if name in part})
        groups |= dict.fromkeys(group.models, group)
    return groups
