"""Checks of a trainer class when it is defined: no method with a wrong name."""

from __future__ import annotations

import difflib
import inspect

from dream_trainer.callbacks.callback import HOOKS

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
    """Refuse a trainer with a method that would never be called.

    Such a method has the name of a callback's hook, or nearly that of an optional method.

    Args:
        cls: A new trainer class.

    Raises:
        TypeError: If the method would never be called.
    """
    for name, value in vars(cls).items():
        if not inspect.isfunction(value) or name.startswith("_") or _is_inherited(cls, name):
            continue
        if name in HOOKS:
            raise TypeError(
                f"{cls.__qualname__}.{name} would never be called: {name} is a hook of callbacks. "
                f"Move it to a Callback, or, if it is a method of your own, name it _{name}"
            )
        for meant in difflib.get_close_matches(name, OPTIONAL, n=1, cutoff=0.85):
            if _is_default(cls, meant):
                raise TypeError(
                    f"{cls.__qualname__}.{name} would never be called by the trainer; did you mean "
                    f"{meant}? If it is a method of your own, name it _{name}"
                )


def _is_inherited(cls: type, name: str) -> bool:
    return any(name in vars(base) for base in cls.__mro__[1:])


def _is_default(cls: type, name: str) -> bool:
    """Whether a method exists and is defined by this package."""
    owner = next((base for base in cls.__mro__ if name in vars(base)), None)
    return owner is not None and owner.__module__.startswith("dream_trainer.trainer.")
