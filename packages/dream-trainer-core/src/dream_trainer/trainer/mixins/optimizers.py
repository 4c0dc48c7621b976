"""Optimizers and learning rate schedulers, and the models that they update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dream_trainer.interface.lr_schedule import LRSchedule
from dream_trainer.interface.trainer import AbstractTrainer
from dream_trainer.trainer.mixins.tracking import assigned_attributes
from dream_trainer.trainer.schedulers import candidates, find_schedules, free_name, split_returned


class OptimizerSetupMixin(AbstractTrainer):
    """Builds optimizers and schedulers once the models have their final parameters."""

    _optimizers: Mapping[str, Optimizer] = {}
    _schedules: Mapping[str, LRSchedule] = {}

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

        They are stepped once per optimizer step, after their optimizer. Return an `LRSchedule` for
        another interval, and for ReduceLROnPlateau, which needs a result. The loaders exist
        already: an epoch has `num_train_batches` batches.

        A scheduler is one of torch's, or any object with `step`, `state_dict` and
        `load_state_dict`. They are found in attributes of any name, and in lists, tuples and dicts
        that are attributes. Parts of another one, as in SequentialLR, are left to it. Those of
        torch may also be made in `configure_optimizers`.

        Returns:
            Nothing, a scheduler, an `LRSchedule`, several, or a dict from optimizer to scheduler.
            Lightning's `{"scheduler": …, "interval": "epoch", "monitor": …}` is understood.
        """

    # What the trainer reads

    def named_optimizers(self) -> Mapping[str, Optimizer]:
        return dict(self._optimizers)

    def named_schedulers(self) -> Mapping[str, LRScheduler]:
        return {name: each.scheduler for name, each in self._schedules.items()}

    def named_schedules(self) -> Mapping[str, LRSchedule]:
        return dict(self._schedules)

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
            RuntimeError: If there is no optimizer, one has parameters of no model or can't use
                sharded ones, or a scheduler changes none of them.
            TypeError: If something else was returned, or a scheduler can't be saved or stepped.
        """
        with assigned_attributes(self, lambda value: isinstance(value, Optimizer)) as names:
            returned = self.configure_optimizers()
        optimizers, schedules = split_returned(returned)
        self._optimizers = self._named(names, optimizers)
        if not self._optimizers:
            raise RuntimeError(
                f"{type(self).__name__}.configure_optimizers made no optimizer; assign one to an "
                "attribute, as in self.optimizer = …, or return it"
            )
        for name, optimizer in self._optimizers.items():
            self._refuse_foreign_parameters(name, optimizer)
            self._refuse_flat_shards(name, optimizer)
        before = candidates(vars(self))
        returned = self.configure_schedulers()
        self._schedules = find_schedules(
            before, candidates(vars(self)), [*schedules, returned], self._optimizers
        )
        self._compare_with_other_ranks()

    def _compare_with_other_ranks(self) -> None:
        optimizers = {
            name: (type(each).__name__, [len(group["params"]) for group in each.param_groups])
            for name, each in self._optimizers.items()
        }
        schedules = self._schedules.items()
        self.world.agree(
            {
                "the optimizers, and the number of parameters in each group": optimizers,
                "the schedulers": {name: type(each.scheduler).__name__ for name, each in schedules},
                "the schedulers' intervals and monitors": {
                    name: each.options for name, each in schedules
                },
            }
        )

    def _named(self, names: list[str], returned: list[Optimizer]) -> dict[str, Optimizer]:
        optimizers = {name: getattr(self, name) for name in names}
        for each in returned:
            if not any(each is known for known in optimizers.values()):
                optimizers[free_name("optimizer", optimizers)] = each
        return optimizers

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
        foreign = {id(p) for p in all_parameters if id(p) not in known}
        bare = [name for name, value in vars(self).items() if id(value) in foreign]
        if bare:
            raise RuntimeError(
                f"self.{bare[0]}, a parameter of optimizer {name!r}, is not in a model, so it "
                "would be neither replicated nor saved; put it into a module that configure_models "
                "assigns: in class Holder(nn.Module) write "
                f"self.{bare[0]} = nn.Parameter(torch.zeros(1)) and a forward that returns it; "
                f"then self.holder = Holder(), and self.holder() instead of self.{bare[0]}"
            )
        if foreign:
            raise RuntimeError(
                f"{len(foreign)} of the {len(all_parameters)} parameters of optimizer {name!r} "
                f"belong to none of the models ({', '.join(self.named_models())}), so training "
                "wouldn't change the models; build the optimizer in configure_optimizers, from "
                "parameters of models assigned in configure_models"
            )
