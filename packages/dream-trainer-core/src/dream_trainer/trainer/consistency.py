"""Checks that ranks have the same config and models, before a difference could deadlock them."""

from __future__ import annotations

import platform
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.callbacks.callback import RankZeroCallback

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer


def agree_on_plan(trainer: BaseTrainer) -> None:
    """Compare config, callbacks and versions over ranks. Collective.

    Compares the fields defined by this package; a user's own fields may depend on the rank. A
    RankZeroCallback may exist on rank 0 only.

    Raises:
        ValueError: On all ranks, if some differ; it shows the values by rank.
    """
    config = trainer.config
    plan: dict[str, Any] = {
        "the version of torch": torch.__version__,
        "the version of Python": platform.python_version(),
        "the trainer's class": type(trainer).__qualname__,
        "the run's name": f"{trainer.project}/{trainer.group}/{trainer.experiment}",
        "seed": config.seed,
        "the callbacks": [
            f"{name}: {type(callback).__qualname__}"
            for name, callback in trainer.callbacks.items()
            if not isinstance(callback, RankZeroCallback)
        ],
    }
    for parameters in (config.training_parameters, config.device_parameters):
        plan |= {
            f"{type(parameters).__name__}.{field.name}": getattr(parameters, field.name)
            for field in fields(parameters)
        }
    trainer.world.agree(plan)


def agree_on_models(trainer: BaseTrainer) -> None:
    """Compare names, shapes and dtypes of all parameters, before they are sharded. Collective.

    Raises:
        ValueError: On all ranks, if some differ; it shows the values by rank.
    """
    if not trainer.world.is_distributed:
        return
    tensors = {
        f"parameter {model_name}.{name}": (
            f"{tuple(parameter.shape)}, {parameter.dtype}"
            f"{'' if parameter.requires_grad else ', frozen'}"
        )
        for model_name, model in trainer.named_models().items()
        for name, parameter in model.named_parameters()
    }
    trainer.world.agree(tensors)
    trainer.world.agree(list(tensors), "the order of the models' parameters")
