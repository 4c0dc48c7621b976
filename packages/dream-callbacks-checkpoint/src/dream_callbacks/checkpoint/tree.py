"""A state as JSON and tensors, and back: no pickle is needed, written or read.

What JSON can't say is a tagged object, such as `{"$tuple": [1, 2]}`. A tensor is a reference to
its name, and a value of one rank alone (RankLocal) a reference into that rank's own file.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_trainer.callbacks import RankLocal

Path: TypeAlias = tuple[str | int, ...]


@dataclass
class Split:
    """A state taken apart.

    Attributes:
        shared: JSON of what is the same on all ranks.
        local: JSON of what belongs to this rank, by its place in the state.
        tensors: Tensors by name, those of this rank's values too.
        paths: Place in the state of each tensor, by name.
    """

    shared: Any = None
    local: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)


def split(state: Any, rank: int) -> Split:
    """Take a state apart.

    Args:
        state: Plain data, tensors and RankLocal values.
        rank: Whose RankLocal values these are; their tensors are named after it.

    Raises:
        TypeError: If a value isn't plain data, so that it couldn't be loaded safely; it names
            the place.
        ValueError: If two tensors would get the same name.
    """
    result = Split()

    def add_tensor(tensor: Tensor, path: Path) -> Any:
        name = ".".join(map(str, path))
        if name in result.tensors:
            raise ValueError(
                f"two tensors of the state would be called {name!r}; rename a key with a dot in it"
            )
        result.tensors[name], result.paths[name] = tensor.detach(), path
        return {"$tensor": name}

    def add_local(value: Any, path: Path) -> Any:
        name = ".".join(map(str, path))
        if name in result.local:
            raise ValueError(f"two values of the state are at {name!r}; rename a key")
        result.local[name] = _encode(value, (f"rank-{rank:05d}", *path), add_tensor, _no_local)
        return {"$rank_local": name}

    result.shared = _encode(state, (), add_tensor, add_local)
    return result


def encode_plain(value: Any) -> Any:
    """Plain data without tensors, as JSON."""
    return _encode(value, (), _no_tensor, _no_local)


def decode_plain(document: Any) -> Any:
    """The inverse of `encode_plain`."""
    return decode(document, {}, {})


def decode(document: Any, tensors: Mapping[str, Tensor], local: Mapping[str, Any]) -> Any:
    """The state again. RankLocal values come back bare.

    Args:
        document: `Split.shared`, or a part of it.
        tensors: By name.
        local: JSON of a rank's own values, by place.

    Raises:
        DamagedCheckpointError: If the document refers to what isn't there, or isn't one.
    """
    if isinstance(document, list):
        return [decode(item, tensors, local) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensors, local) for key, value in document.items()}
    content = document[tag]
    try:
        if tag == "$tensor":
            return tensors[content]
        if tag == "$rank_local":
            return decode(local[content], tensors, {})
        if tag in _CONTAINERS:
            return _CONTAINERS[tag]([decode(item, tensors, local) for item in content])
        return _LEAVES[tag](content)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedCheckpointError(f"{{{tag!r:.40}: {content!r:.80}}}: {error!r:.200}") from error


def tensor_names(document: Any) -> Iterator[str]:
    """Names of the tensors that a document refers to."""
    if isinstance(document, list):
        for item in document:
            yield from tensor_names(item)
    elif isinstance(document, dict):
        if isinstance(document.get("$tensor"), str):
            yield document["$tensor"]
        else:
            for value in document.values():
                yield from tensor_names(value)


def _encode(
    value: Any,
    path: Path,
    add_tensor: Callable[[Tensor, Path], Any],
    add_local: Callable[[Any, Path], Any],
) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return add_tensor(value, path)

    def inner(item: Any, key: str | int) -> Any:
        return _encode(item, (*path, key), add_tensor, add_local)

    if kind is RankLocal:
        return add_local(value.value, path)
    if kind is dict and all(type(key) is str and not key.startswith("$") for key in value):
        return {key: inner(item, key) for key, item in value.items()}
    if kind in (list, tuple, set, torch.Size):
        items = [inner(item, index) for index, item in enumerate(value)]
        return items if kind is list else {_TAGS[kind]: items}
    if kind in (dict, OrderedDict, Counter):
        pairs = [[inner(key, "key"), inner(item, str(key))] for key, item in value.items()]
        return {_TAGS[kind]: pairs}
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if kind is complex:
        return {"$complex": [repr(value.real), repr(value.imag)]}
    if kind is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if kind is torch.device:
        return {"$device": str(value)}
    raise TypeError(
        f"the state holds a {kind.__module__}.{kind.__qualname__} at {_spelled(path)}, which "
        "can't be saved without pickling; make it plain data: numbers, strings, bytes, tensors, "
        "and lists, tuples, sets and dicts of them"
    )


_TAGS: dict[type, str] = {
    tuple: "$tuple",
    set: "$set",
    torch.Size: "$size",
    dict: "$dict",
    OrderedDict: "$ordered_dict",
    Counter: "$counter",
}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def _counter(pairs: list[Any]) -> Counter[Any]:
    return Counter(dict(pairs))


_CONTAINERS: dict[str, Callable[[list[Any]], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$size": torch.Size,
    "$dict": dict,
    "$ordered_dict": OrderedDict,
    "$counter": _counter,
}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "$dtype": _dtype,
    "$device": torch.device,
}


def _no_tensor(tensor: Tensor, path: Path) -> Any:
    raise TypeError(f"a tensor at {_spelled(path)} where only numbers and text are expected")


def _no_local(value: Any, path: Path) -> Any:
    raise TypeError(f"a RankLocal at {_spelled(path)}, where there can't be one")


def _spelled(path: Path) -> str:
    return "state" + "".join(f"[{key!r}]" for key in path)
