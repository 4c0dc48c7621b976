"""What a callback needs of its trainer, and what a trainer lacks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, ForwardRef, get_args, get_origin

from typing_extensions import NoDefault, TypeVar, get_original_bases

from dream_trainer.interface.intersection import members_of


def requirements_of(callback_class: type, root: type) -> tuple[type, ...]:
    """The classes that a callback asks its trainer for, over all its bases.

    Args:
        callback_class: A subclass of `root`, which was written as `root[requirement]`.
        root: The generic class whose parameter is the requirement.
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
    """What stands for a type variable that was given no value: its default, else its bound."""
    if not isinstance(argument, TypeVar):
        return argument
    default = getattr(argument, "__default__", NoDefault)
    return argument.__bound__ if default in (NoDefault, None) else default


def _looked_up(argument: Any, cls: type) -> Any:
    """The class that a string names, in the module of the callback that wrote it.

    A name that is only imported for type checkers can't be found, and so isn't checked.
    """
    if not isinstance(argument, ForwardRef):
        return argument
    return getattr(sys.modules.get(cls.__module__), argument.__forward_arg__, Any)


def lacking(trainer: Any, requirements: tuple[type, ...]) -> list[type]:
    """Those of `requirements` that the trainer doesn't derive from."""
    return [requirement for requirement in requirements if not isinstance(trainer, requirement)]
