"""GuardedNames: a trainer's attributes that would be ignored, or hide a part of it, are errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Never

from dream_trainer.callbacks.collection import CallbackCollection
from dream_trainer.configs.training import TrainingParameters
from dream_trainer.interface.trainer import Counters
from dream_trainer.trainer.class_checks import hidden_by
from dream_trainer.trainer.config import BaseTrainerConfig
from dream_trainer.trainer.foreign_names import FOREIGN_ATTRIBUTES, FOREIGN_SWITCHES
from dream_trainer.world.requests import Requests
from dream_trainer.world.world import World

_KINDS: dict[str, tuple[type, ...]] = {
    "callbacks": (CallbackCollection,),
    "config": (BaseTrainerConfig,),
    "counters": (Counters,),
    "exception": (BaseException, type(None)),
    "requests": (Requests,),
    "running": (str, type(None)),
    "stop_reason": (str, type(None)),
    "training_parameters": (TrainingParameters,),
    "world": (World,),
}
"""Attributes of trainers whose names a user's attribute might have."""


class GuardedNames:
    """Refuses attributes that trainers of other frameworks have, and says what is written here.

    Reading is slower only for names that don't exist. Assigning to a trainer's attribute takes
    0.3 µs more.
    """

    if not TYPE_CHECKING:  # type checkers would allow any attribute, and calls

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property raised an AttributeError: show that one
                return object.__getattribute__(self, name)
            advice = FOREIGN_ATTRIBUTES.get(name)
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
                + (f"; here: {advice}" if advice else ""),
                name=name,
                obj=self,
            )

        def __call__(self, *args: Any, **options: Any) -> Any:
            raise TypeError(
                f"{type(self).__name__} is a trainer, and was called like a model; call the model "
                "that configure_models assigns: self.model(…)"
            )

    _seed: int | None = None

    @property
    def seed(self) -> int | None:
        """The seed of all random number generators; None before `configure`."""
        return self._seed

    @seed.setter
    def seed(self, value: Never) -> None:
        raise AttributeError(
            f"trainer.seed = {value!r}: the seed is set in the config, DreamTrainerConfig(seed=…), "
            "before `configure`; give an attribute of your own another name"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _KINDS or name in FOREIGN_SWITCHES or hasattr(type(self), name):
            _check_assignment(self, name, value)
        super().__setattr__(name, value)


def _check_assignment(trainer: object, name: str, value: Any) -> None:
    """Check the value of an attribute that a trainer has or would ignore.

    Raises:
        AttributeError: If it is ignored, hides a method, or isn't what the trainer needs there.
    """
    assignment = f"{type(trainer).__name__}.{name} = {value!r:.60}"
    if name in FOREIGN_SWITCHES:
        raise AttributeError(f"{assignment}: {FOREIGN_SWITCHES[name]}")
    if name in _KINDS and not isinstance(value, _KINDS[name]):
        kinds = " or ".join(kind.__name__ for kind in _KINDS[name] if kind is not type(None))
        raise AttributeError(
            f"{assignment}: the trainer's own {name} is a {kinds}; give your attribute another name"
        )
    found = getattr(type(trainer), name, None)
    if isinstance(found, property) and found.fset is None:
        raise AttributeError(
            f"{assignment}: {name} is a property of trainers; give your attribute another name"
        )
    if hidden_by(type(trainer).__mro__, name, value) == "method":
        raise AttributeError(
            f"{assignment} would hide the method {name}; give your attribute another name"
        )
