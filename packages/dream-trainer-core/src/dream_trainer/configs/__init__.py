"""Config dataclasses of a run, without side effects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dream_trainer.configs.checked_fields import CheckedFields
from dream_trainer.configs.device import DeviceParameters, MeshShape
from dream_trainer.configs.logging import LoggingParameters, WandbLoggingParameters
from dream_trainer.configs.training import TrainingParameters

if TYPE_CHECKING:
    from dream_callbacks.checkpoint import CheckpointParameters as CheckpointParameters

__all__ = [
    "CheckedFields",
    "DeviceParameters",
    "LoggingParameters",
    "MeshShape",
    "TrainingParameters",
    "WandbLoggingParameters",
]


def __getattr__(name: str) -> Any:
    from dream_trainer.callbacks._aliases import resolve

    return resolve(__name__, name)


def __dir__() -> list[str]:
    from dream_trainer.callbacks._aliases import names_in

    return sorted({*globals(), *names_in(__name__)})
