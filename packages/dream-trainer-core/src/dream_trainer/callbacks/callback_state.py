"""Saving and loading the state of one callback, as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dream_trainer.callbacks.dispatch import Call
from dream_trainer.callbacks.plain_data import values_not_plain, without_rank_local

if TYPE_CHECKING:
    from dream_trainer.interface.trainer import AbstractTrainer


def state_of(state_dict: Call) -> dict[str, Any]:
    """The state that a callback's `state_dict` returns.

    Raises:
        TypeError: If it isn't a dict, or has values that `torch.load(weights_only=True)` refuses;
            it names the callback and the path in its state.
    """
    state = state_dict()
    if not isinstance(state, dict):
        raise TypeError(
            f"{state_dict.name}.state_dict() returned {state!r:.80}; a dict is required: "
            "return {} if there is nothing to save"
        )
    foreign = next(values_not_plain(state), None)
    if foreign is None:
        return state
    path, value = foreign
    raise TypeError(
        f"the state of callback {state_dict.name} holds a {type(value).__qualname__} at "
        f"state_dict(){path}, which a safe checkpoint can't hold; return plain data: numbers, "
        "strings, bytes, tensors, and lists, tuples, sets and dicts of them"
    )


def load_state(load_state_dict: Call, state: Any, trainer: AbstractTrainer | None) -> None:
    """Load a callback's state; passes the trainer if `load_state_dict` takes it."""
    state = without_rank_local(state)
    own: Callable[..., None] = load_state_dict.callback.load_state_dict
    if _takes_trainer(own):
        load_state_dict(state, trainer)
    else:
        load_state_dict(state)


def _takes_trainer(load_state_dict: Callable[..., Any]) -> bool:
    """Whether the second argument is the trainer, not an option that has a default."""
    parameters = list(inspect.signature(load_state_dict).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return True
    second = parameters[1] if len(parameters) > 1 else None
    return second is not None and (second.name == "trainer" or second.default is second.empty)
