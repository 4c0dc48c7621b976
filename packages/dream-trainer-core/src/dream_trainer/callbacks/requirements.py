"""What a callback needs of its trainer, and what a trainer lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from typing_extensions import get_original_bases

from dream_trainer.trainer.intersection import members_of


def requirements_of(callback_class: type, root: type) -> tuple[type, ...]:
    """The classes that a callback asks its trainer for, over all its bases.

    Args:
        callback_class: A subclass of `root`, which was written as `root[requirement]`.
        root: The generic class whose parameter is the requirement.
    """
    return tuple(dict.fromkeys(_requirements(callback_class, root, {})))


def _requirements(cls: type, root: type, arguments: dict[Any, Any]) -> Iterator[type]:
    for base in get_original_bases(cls):
        origin = get_origin(base) or base
        if not (isinstance(origin, type) and issubclass(origin, root)):
            continue
        given = [arguments.get(argument, argument) for argument in get_args(base)]
        if origin is root:
            for argument in given:
                yield from members_of(argument)
        else:
            parameters = getattr(origin, "__parameters__", ())
            yield from _requirements(origin, root, dict(zip(parameters, given, strict=False)))


def lacking(trainer: Any, requirements: tuple[type, ...]) -> list[type]:
    """Those of `requirements` that the trainer doesn't derive from."""
    return [requirement for requirement in requirements if not isinstance(trainer, requirement)]
