"""CheckedFields: assigning an attribute that a config doesn't have is an error."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from typing import Any


class CheckedFields:
    """Base of a dataclass whose attributes are its fields.

    Raises:
        AttributeError: If another attribute is assigned: it would be ignored. Attributes of the
            class, and names that begin with an underscore, are allowed.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_known(self, name):
            nearest = difflib.get_close_matches(name, _names_of(self), n=1, cutoff=0.6)
            advice = f"; did you mean {nearest[0]}?" if nearest else ""
            raise AttributeError(
                f"{type(self).__name__}.{name} = {value!r:.60} would be ignored: there is no such "
                f"field{advice}"
            )
        super().__setattr__(name, value)


class CheckedNames:
    """Base of a dataclass that may have other attributes, unless they look like a field.

    Raises:
        AttributeError: If an attribute is assigned whose name is nearly that of a field, or of a
            field of one of its configs, with another value.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_known(self, name):
            meant = _similar(self, name, value)
            if meant is not None:
                raise AttributeError(
                    f"{type(self).__name__}.{name} = {value!r:.60} would be ignored; did you mean "
                    f"{meant}? An attribute of your own needs a field, as in "
                    f"{name}: … = field(init=False)"
                )
        super().__setattr__(name, value)


def _names_of(config: Any) -> list[str]:
    """Names of a dataclass's fields."""
    return [field.name for field in fields(config)]


def _is_known(config: Any, name: str) -> bool:
    return name.startswith("_") or name in _names_of(config) or hasattr(type(config), name)


def _similar(config: Any, name: str, value: Any) -> str | None:
    """The field that may have been meant, of the config or of one of its configs."""
    own = difflib.get_close_matches(name, _names_of(config), n=1, cutoff=0.8)
    if own:
        return own[0]
    for owner in _names_of(config):
        part = vars(config).get(owner)
        if is_dataclass(part):
            meant = difflib.get_close_matches(name, _names_of(part), n=1, cutoff=0.8)
            if meant and not (meant[0] == name and getattr(part, name) == value):
                return f"{owner}.{meant[0]}"
    return None
