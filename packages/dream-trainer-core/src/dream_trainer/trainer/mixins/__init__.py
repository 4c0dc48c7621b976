"""Mixins of trainers; callbacks declare them as requirements."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dream_trainer.trainer.mixins.dataloaders import DataLoaderSetupMixin
from dream_trainer.trainer.mixins.eval_metric import EvalMetricMixin
from dream_trainer.trainer.mixins.logger import LoggerMixin, Sink
from dream_trainer.trainer.mixins.models import ModelSetupMixin
from dream_trainer.trainer.mixins.optimizers import OptimizerSetupMixin
from dream_trainer.trainer.mixins.setup import SetupMixin

if TYPE_CHECKING:
    from dream_callbacks.logging import WandBLoggerMixin as WandBLoggerMixin

__all__ = [
    "DataLoaderSetupMixin",
    "EvalMetricMixin",
    "LoggerMixin",
    "ModelSetupMixin",
    "OptimizerSetupMixin",
    "SetupMixin",
    "Sink",
]


def __getattr__(name: str) -> Any:
    from dream_trainer.callbacks._aliases import resolve

    return resolve(__name__, name)


def __dir__() -> list[str]:
    from dream_trainer.callbacks._aliases import names_in

    return sorted({*globals(), *names_in(__name__)})
