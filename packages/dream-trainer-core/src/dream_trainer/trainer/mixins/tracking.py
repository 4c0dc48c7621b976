"""Tracking of attributes that a method assigns: models, optimizers and metrics get their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def assigned_attributes(owner: object, is_part: Callable[[Any], bool]) -> Iterator[list[str]]:
    """Names of the attributes assigned inside whose values are parts, in order of assignment.

    Args:
        owner: The object with the attributes.
        is_part: Whether a value is tracked.

    Yields:
        A list that is filled on exit.
    """
    before = dict(vars(owner))
    names: list[str] = []
    yield names
    for name, value in vars(owner).items():
        if before.get(name) is not value and not name.startswith("_") and is_part(value):
            names.append(name)
