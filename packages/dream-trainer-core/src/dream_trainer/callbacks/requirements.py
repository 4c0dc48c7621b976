"""Requirements of callbacks on their trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, ForwardRef, get_args, get_origin

from typing_extensions import NoDefault, TypeVar, get_original_bases

from dream_trainer.interface.intersection import members_of


def requirements_of(callback_class: type, root: type) -> tuple[type, ...]:
    """The classes that a trainer must derive from, over all bases of a callback.

    Args:
        callback_class: A subclass of `root[requirement]`.
        root: The generic class whose type parameter is the requirement.
    """
    return tuple(dict.fromkeys(_requirements(callback_class, root, {})))


def _requirements(cls: type, root: type, given: Mapping[Any, Any]) -> Iterator[type]:
    """Follow the parameter of `root` down from `cls`, whose own parameters are `given`."""
    for base in get_original_bases(cls):
        origin = get_origin(base) or base
        if not (isinstance(origin, type) and issubclass(origin, root)):
            continue
        parameters: tuple[Any, ...] = getattr(origin, "__parameters__", ())
        arguments = get_args(base) or tuple(map(_default, parameters))
        arguments = tuple(_looked_up(given.get(argument, argument), cls) for argument in arguments)
        if origin is root:
            for argument in arguments:
                yield from members_of(_looked_up(_default(argument), cls))
        else:
            yield from _requirements(origin, root, dict(zip(parameters, arguments, strict=False)))


def _default(argument: Any) -> Any:
    """The value of a type variable without argument: its default, else its bound."""
    if not isinstance(argument, TypeVar):
        return argument
    default = getattr(argument, "__default__", NoDefault)
    return argument.__bound__ if default in (NoDefault, None) else default


def _looked_up(argument: Any, cls: type) -> Any:
    """The class that a string names, in the module of the callback.

    A name that is only imported under TYPE_CHECKING isn't found, and so isn't checked.
    """
    if not isinstance(argument, ForwardRef):
        return argument
    return getattr(sys.modules.get(cls.__module__), argument.__forward_arg__, Any)


def missing_requirements(trainer: Any, requirements: tuple[type, ...]) -> list[type]:
    """The `requirements` that the trainer doesn't derive from."""
    return [requirement for requirement in requirements if not isinstance(trainer, requirement)]
