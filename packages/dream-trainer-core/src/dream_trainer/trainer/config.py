"""BaseTrainerConfig: the fields that the loop needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

from dream_trainer.callbacks.callback import Callback
from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import AbstractTrainerConfig, check_kind

_Callbacks = Mapping[str, Callback[Any]] | Iterable[Callback[Any] | tuple[str, Callback[Any]]]


class _CollectionField:
    """A field that is read as a CallbackCollection, and takes what makes one."""

    @overload
    def __get__(self, config: None, kind: type) -> CallbackCollection: ...
    @overload
    def __get__(self, config: object, kind: type) -> CallbackCollection: ...
    def __get__(self, config: object | None, kind: type) -> Any:
        return () if config is None else vars(config)["callbacks"]  # () is the field's default

    def __set__(self, config: object, value: CallbackCollection | _Callbacks) -> None:
        given: Any = value
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise TypeError(
                f"callbacks={given!r:.80}: a CallbackCollection or a list is required, not a "
                f"{type(given).__name__}; write callbacks=[…]"
            )
        is_one = isinstance(given, CallbackCollection)
        vars(config)["callbacks"] = given if is_one else CallbackCollection(given)


@dataclass(kw_only=True)
class BaseTrainerConfig(AbstractTrainerConfig):
    """Length of training, and callbacks.

    Args:
        training_parameters: Length and cadence.
        callbacks: The callbacks, in the order in which they run: a CallbackCollection, or what it
            takes, such as a list.

    Raises:
        TypeError: If a field has the wrong type.
    """

    training_parameters: TrainingParameters = field(default_factory=TrainingParameters)
    callbacks: _CollectionField = _CollectionField()  # it is a descriptor

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self, "training_parameters", TrainingParameters, "TrainingParameters(…)")
