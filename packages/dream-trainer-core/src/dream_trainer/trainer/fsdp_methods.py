"""Methods of FSDP modules that steps call: parameters are gathered for them as for `forward`."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from dream_trainer.world import torch_private

_SET_UP = ("configure_", "apply_", "init_weights", "model_state_dict", "__init__")
"""Beginnings of the names of a trainer's methods that aren't called in a step."""


def gather_in_methods(model: nn.Module, trainer_class: type) -> None:
    """Gather a sharded model's parameters in those of its methods that a trainer's steps name.

    FSDP does it for `forward` alone. They run as they are if they get no tensor, such as a method
    that changes weights, and inside of `forward` and of each other.
    """
    named = set(_names_in_steps(trainer_class))
    for module in torch_private.fsdp_modules(model):
        for name in sorted(_methods(type(module)) & named):
            _gather_in(module, name)


def explain_sharded_call(error: BaseException) -> None:
    """Add a note to an error of torch that comes from using parameters that aren't gathered."""
    from torch.distributed.fsdp import FSDPModule

    if "mixed torch.Tensor and DTensor" not in str(error):
        return
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called, method = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(called, nn.Module) and method != "_call_impl":
            break
    else:
        return
    name = _class_name(called)
    if isinstance(called, FSDPModule) and method not in ("forward", "_wrapped_call_impl"):
        advice = (
            f"{method} of {name} was called, and FSDP gathers parameters for forward alone: in "
            "apply_fully_shard(config), after super(), call torch.distributed.fsdp."
            f'register_fsdp_forward_method(self.…, "{method}") with that module'
        )
    else:
        advice = (
            f"a {name} inside a module that FSDP shards was called by itself, and FSDP gathers its "
            "parameters for forward of that module alone: call it there, or in apply_fully_shard("
            f"config), before super(), shard the {name} by itself: fully_shard(self.…, **config)"
        )
    error.add_note(advice)


def _gather_in(module: nn.Module, name: str) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    plain: Callable[..., Any] = getattr(module, name)

    @functools.wraps(plain)
    def unchanging(*args: Any, **kwargs: Any) -> Any:
        before = _versions(module)
        result = plain(*args, **kwargs)
        if _versions(module) != before:
            raise RuntimeError(
                f"{name} of {_class_name(module)} changed parameters while FSDP had them "
                "gathered, and the change would be lost; change them in a method that gets no "
                "tensor, or in one that no step names: it gets the shards"
            )
        return result

    vars(module)[name] = unchanging
    register_fsdp_forward_method(module, name)
    gathering: Callable[..., Any] = getattr(module, name)

    @functools.wraps(plain)
    def method(*args: Any, **kwargs: Any) -> Any:
        gathers = _has_tensor((args, kwargs)) and not torch_private.is_in_fsdp_forward(module)
        return (gathering if gathers else plain)(*args, **kwargs)

    setattr(module, name, method)


def _class_name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("FSDP")  # a generated subclass


def _versions(module: nn.Module) -> list[int]:
    """How often each gathered parameter was changed in place."""
    from torch.distributed.tensor import DTensor

    return [p._version for p in module.parameters() if not isinstance(p, DTensor)]  # noqa: SLF001


def _has_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_tensor, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensor, value))
    return isinstance(value, Tensor)


def _methods(module_class: type) -> set[str]:
    """Names of the methods of a module that nn.Module doesn't have."""
    from torch.distributed.fsdp import FSDPModule

    return {
        name
        for each in module_class.__mro__
        if not issubclass(nn.Module, each) and each is not FSDPModule
        for name, value in vars(each).items()
        if isinstance(value, FunctionType)
        and not name.startswith("_")
        and not inspect.isgeneratorfunction(value)
        and not hasattr(nn.Module, name)
        and not hasattr(FSDPModule, name)
    } - {"forward"}


def _names_in_steps(trainer_class: type) -> Iterator[str]:
    """Attributes that a trainer's own methods use, except for those that are called in set-up."""
    for each in trainer_class.__mro__:
        if each.__module__.startswith(("dream_trainer.trainer", "dream_trainer.interface")):
            continue
        for name, value in vars(each).items():
            if isinstance(value, FunctionType) and not name.startswith(_SET_UP):
                yield from _names(inspect.unwrap(value).__code__)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
