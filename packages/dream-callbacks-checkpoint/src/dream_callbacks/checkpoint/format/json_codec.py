"""Encode plain data as JSON and decode it, without pickle and without torch.

Types that JSON lacks are tagged objects, such as `{"$tuple": [1, 2]}`.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from dream_callbacks.checkpoint.errors import DamagedCheckpointError

Path: TypeAlias = tuple[str | int, ...]
"""Path of a value in a structure: the keys that lead to it."""

Foreign: TypeAlias = Callable[[Any, Path], Any]
"""Encodes a value that isn't plain data, or returns NotImplemented."""


def encode(value: Any, path: Path = (), foreign: Foreign | None = None) -> Any:
    """Encode plain data as JSON.

    Args:
        value: Numbers, strings, bytes, and lists, tuples, sets and dicts of them.
        path: Path of the value, for errors.
        foreign: Encodes values that aren't plain data.

    Raises:
        TypeError: If a value can't be saved; it names the path.
    """
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def inner(item: Any, key: str | int) -> Any:
        return encode(item, (*path, key), foreign)

    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: inner(item, key) for key, item in value.items()}
    if kind in (list, tuple, set):
        items = [inner(item, index) for index, item in enumerate(value)]
        return items if kind is list else {_TAGS[kind]: items}
    if kind in (dict, OrderedDict, Counter):
        pairs = [[inner(key, "key"), inner(item, str(key))] for key, item in value.items()]
        return {_TAGS[kind]: pairs}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    encoded = NotImplemented if foreign is None else foreign(value, path)
    if encoded is NotImplemented:
        raise TypeError(
            f"the state holds a {kind.__module__}.{kind.__qualname__} at {spelled(path)}, which "
            "can't be saved without pickling; make it plain data: numbers, strings, bytes, "
            "tensors, and lists, tuples, sets and dicts of them"
        )
    return encoded


def decode(document: Any, foreign: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """Decode what `encode` returned.

    Args:
        document: Parsed JSON.
        foreign: Decoders by tag, for values that aren't plain data.

    Raises:
        DamagedCheckpointError: If the document is malformed.
    """
    if isinstance(document, list):
        return [decode(item, foreign) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: decode(value, foreign) for key, value in document.items()}
    content = document[tag]
    try:
        if tag in _CONTAINERS:
            return _CONTAINERS[tag]([decode(item, foreign) for item in content])
        return (_LEAVES.get(tag) or (foreign or {})[tag])(content)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedCheckpointError(f"{{{tag!r:.40}: {content!r:.80}}}: {error!r:.200}") from error


def spelled(path: Path) -> str:
    """Format a path, as in `state['a'][0]`."""
    return "state" + "".join(f"[{key!r}]" for key in path)


def _counter(pairs: list[Any]) -> Counter[Any]:
    return Counter(dict(pairs))


_TAGS: dict[type, str] = {
    tuple: "$tuple",
    set: "$set",
    dict: "$dict",
    OrderedDict: "$ordered_dict",
    Counter: "$counter",
}
_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$dict": dict,
    "$ordered_dict": OrderedDict,
    "$counter": _counter,
}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
}
