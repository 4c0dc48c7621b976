"""Which attributes a trainer gains while one of its methods runs: how parts get their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def assigned_attributes(owner: object, is_part: Callable[[Any], bool]) -> Iterator[list[str]]:
    """Names of the attributes assigned inside whose values are parts, in order of assignment.

    Args:
        owner: The object that is assigned to.
        is_part: Tells which values count.

    Yields:
        A list that is filled on the way out.
    """
    before = dict(vars(owner))
    names: list[str] = []
    yield names
    for name, value in vars(owner).items():
        if before.get(name) is not value and not name.startswith("_") and is_part(value):
            names.append(name)
