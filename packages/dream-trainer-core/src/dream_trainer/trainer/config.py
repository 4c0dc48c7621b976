"""BaseTrainerConfig: the fields that the loop needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import AbstractTrainerConfig, check_kind


@dataclass(kw_only=True)
class BaseTrainerConfig(AbstractTrainerConfig):
    """Length of training, and callbacks.

    Args:
        training_parameters: Length and cadence.
        callbacks: The callbacks, in the order in which they run.

    Raises:
        TypeError: If a field has the wrong type, such as callbacks in a plain list.
    """

    training_parameters: TrainingParameters = field(default_factory=TrainingParameters)
    callbacks: CallbackCollection = field(default_factory=CallbackCollection)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self, "training_parameters", TrainingParameters, "TrainingParameters(…)")
        check_kind(self, "callbacks", CallbackCollection, "CallbackCollection([…])")
