"""Checks of a trainer class when it is defined: no name that would be ignored or hide another."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.callbacks.foreign_hooks import FOREIGN_HOOKS
from dream_trainer.trainer.foreign_names import FOREIGN_METHODS, SYNONYMS

REQUIRED = ("configure_models", "configure_optimizers", "configure_dataloaders", "training_step")
# A misspelt required method fails when it is called; these would silently keep their default.
OPTIONAL = (
    "validation_step",
    "test_step",
    "predict_step",
    "init_weights",
    "configure_schedulers",
    "configure_metrics",
    "configure_train_metrics",
    "apply_tensor_parallel",
    "apply_context_parallel",
    "apply_activation_checkpointing",
    "apply_compile",
    "apply_fully_shard",
    "apply_replicate",
    "model_state_dict",
    "move_batch",
    "num_samples",
    "clip_gradients",
)


def check_definition(cls: type) -> None:
    """Refuse a trainer with a method that would never be called, or a value that hides a method.

    Such a method has the name of a callback's hook, also of another framework's, or nearly that of
    a method that the trainer calls.

    Args:
        cls: A new trainer class.

    Raises:
        TypeError: If there is one.
    """
    for name, value in vars(cls).items():
        if name.startswith("__"):
            continue
        hidden = hidden_by(cls.__mro__[1:], name, value)
        if inspect.isfunction(value):
            _check_method(cls, name, value)
        elif hidden is not None and value is not None and not hasattr(type(value), "__get__"):
            raise TypeError(
                f"{cls.__qualname__}.{name} = {value!r:.60} would hide the {hidden} {name} of "
                "trainers; give it another name"
            )


def hidden_by(classes: tuple[type, ...], name: str, value: Any) -> str | None:
    """What a value would hide: "method" or "property"; None if nothing.

    A function may replace a method, as `torch.compile` makes one; a module may not. `loader` may be
    hidden: only a trainer's own methods call it, and many have an attribute of that name.
    """
    if name == "loader":
        return None
    owner = next((base for base in classes if name in vars(base)), None)
    found = None if owner is None else vars(owner)[name]
    if isinstance(found, property):
        return None if getattr(found, "__isabstractmethod__", False) else "property"
    if inspect.isroutine(found) or isinstance(found, (staticmethod, classmethod)):
        return None if callable(value) and not isinstance(value, nn.Module) else "method"
    return None


def _check_method(cls: type, name: str, method: Any) -> None:
    if name in FOREIGN_METHODS and not _is_inherited(cls, name, but_properties=True):
        raise TypeError(
            f"{cls.__qualname__}.{name} would never be called: {FOREIGN_METHODS[name]}. "
            f"If it is a method of your own, name it _{name}"
        )
    if name in ("setup", "teardown") and "stage" in inspect.signature(method).parameters:
        raise TypeError(
            f"{cls.__qualname__}.{name} has a stage, as Lightning's, and would be called without "
            "one; write configure_… methods, or pre_setup and post_fit of a Callback"
        )
    if name.startswith("_") or _is_inherited(cls, name):
        return
    if name in HOOKS or name in FOREIGN_HOOKS:
        hook = FOREIGN_HOOKS.get(name, name)
        called = "is a hook" if name in HOOKS else f"is called {hook} here, a hook"
        raise TypeError(
            f"{cls.__qualname__}.{name} would never be called: {name} {called} of callbacks. "
            f"Move it to a Callback, or, if it is a method of your own, name it _{name}"
        )
    meant = [SYNONYMS[name]] if name in SYNONYMS else []
    meant += difflib.get_close_matches(name, (*REQUIRED, *OPTIONAL), n=1, cutoff=0.85)
    for each in meant:
        if _is_default(cls, each):
            raise TypeError(
                f"{cls.__qualname__}.{name} would never be called by the trainer; did you mean "
                f"{each}? If it is a method of your own, name it _{name}"
            )


def _is_inherited(cls: type, name: str, *, but_properties: bool = False) -> bool:
    inherited = [vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)]
    return any(not (but_properties and isinstance(each, property)) for each in inherited)


def _is_default(cls: type, name: str) -> bool:
    """Whether a method exists and is defined by this package."""
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    return owner is not None and owner.__module__.startswith("dream_trainer.trainer.")
