"""Optimizers and learning rate schedulers, and the models that they update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.mixins.tracking import assigned_attributes


class OptimizerSetupMixin(AbstractTrainer):
    """Builds optimizers and schedulers once the models have their final parameters."""

    _optimizers: Mapping[str, Optimizer] = {}
    _schedulers: Mapping[str, LRScheduler] = {}

    # What the user writes

    def configure_optimizers(self) -> Any:
        """Assign optimizers to attributes, or return them.

        Returns:
            Nothing, an optimizer, several, or a dict from model to optimizer.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no configure_optimizers; write one that assigns the "
            "optimizer: self.optimizer = torch.optim.AdamW(self.model.parameters())"
        )

    def configure_schedulers(self) -> Any:
        """Assign learning rate schedulers to attributes, or return them. Optional.

        They are stepped once per optimizer step, after their optimizer; except ReduceLROnPlateau,
        which needs a metric: step it in a callback's `post_validation_epoch`. The loaders exist
        already: an epoch has `num_train_batches` batches.

        Returns:
            Nothing, a scheduler, several, or a dict from optimizer to scheduler.
        """

    # What the trainer reads

    def named_optimizers(self) -> Mapping[str, Optimizer]:
        return dict(self._optimizers)

    def named_schedulers(self) -> Mapping[str, LRScheduler]:
        return dict(self._schedulers)

    def models_of(self, optimizer: Optimizer) -> dict[str, nn.Module]:
        """The models whose parameters an optimizer updates, by name."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {
            name: model
            for name, model in self.named_models().items()
            if any(id(parameter) in own for parameter in model.parameters())
        }

    def model_of(self, optimizer: Optimizer) -> nn.Module:
        return next(iter(self.models_of(optimizer).values()))

    # Building

    def build_optimizers(self) -> None:
        """Call `configure_optimizers` and `configure_schedulers`, and keep what they made.

        Collective.

        Raises:
            ValueError: On all ranks, if they differ between ranks.
            RuntimeError: If there is no optimizer, one has parameters of no model, or one can't
                use sharded parameters.
        """
        with assigned_attributes(self, lambda value: isinstance(value, Optimizer)) as names:
            returned = self.configure_optimizers()
        self._optimizers = self._named(names, _flat(returned, Optimizer), "optimizer")
        if not self._optimizers:
            raise RuntimeError(
                f"{type(self).__name__}.configure_optimizers made no optimizer; assign one to an "
                "attribute, as in self.optimizer = …, or return it"
            )
        for name, optimizer in self._optimizers.items():
            self._refuse_foreign_parameters(name, optimizer)
            self._refuse_flat_shards(name, optimizer)
        with assigned_attributes(self, lambda value: isinstance(value, LRScheduler)) as names:
            returned = self.configure_schedulers()
        self._schedulers = self._named(names, _flat(returned, LRScheduler), "scheduler")
        self._compare_with_other_ranks()

    def _compare_with_other_ranks(self) -> None:
        optimizers = {
            name: (type(each).__name__, [len(group["params"]) for group in each.param_groups])
            for name, each in self._optimizers.items()
        }
        schedulers = {name: type(each).__name__ for name, each in self._schedulers.items()}
        self.world.agree(
            {
                "the optimizers, and the number of parameters in each group": optimizers,
                "the schedulers": schedulers,
            }
        )

    def _named(self, names: list[str], returned: list[Any], kind: str) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in names}
        for part in returned:
            if not any(part is known for known in parts.values()):
                parts[kind if kind not in parts else f"{kind}_{len(parts) + 1}"] = part
        return parts

    def _refuse_flat_shards(self, name: str, optimizer: Optimizer) -> None:
        is_sharded = self.world.shape.uses_fsdp or self.world.tp_size > 1
        if isinstance(optimizer, LBFGS) and is_sharded:
            raise RuntimeError(
                f"optimizer {name!r} is torch's LBFGS, which puts all parameters into one vector; "
                f"it can't do that with the sharded ones of layout {self.world.shape.layout!r}: "
                "use DeviceParameters.DDP() or another optimizer"
            )

    def _refuse_foreign_parameters(self, name: str, optimizer: Optimizer) -> None:
        known = {id(p) for model in self.named_models().values() for p in model.parameters()}
        all_parameters = [p for group in optimizer.param_groups for p in group["params"]]
        foreign = sum(id(parameter) not in known for parameter in all_parameters)
        if foreign:
            raise RuntimeError(
                f"{foreign} of the {len(all_parameters)} parameters of optimizer {name!r} belong "
                f"to none of the models ({', '.join(self.named_models())}), so training wouldn't "
                "change the models; build the optimizer in configure_optimizers, from parameters "
                "of models assigned in configure_models"
            )


def _flat(returned: Any, kind: type) -> list[Any]:
    return list(_of_kind(returned, kind))


def _of_kind(returned: Any, kind: type) -> Iterator[Any]:
    if isinstance(returned, kind):
        yield returned
    elif isinstance(returned, Mapping):
        for value in returned.values():
            yield from _of_kind(value, kind)
    elif isinstance(returned, (list, tuple)):
        for value in returned:
            yield from _of_kind(value, kind)
    elif returned is not None:
        raise TypeError(
            f"an object of type {kind.__name__} was expected, alone, in a list or as the value of "
            f"a dict, and {returned!r:.80} was returned"
        )
