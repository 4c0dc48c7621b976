"""Encode a state dict as JSON and tensors, and decode it, without pickle.

Types that JSON lacks are tagged objects, such as `{"$tuple": [1, 2]}`. The JSON refers to a tensor
by its name, and to a RankLocal value by its path in the rank's file. torch is imported only where a
value needs it: listing checkpoints doesn't.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from dream_callbacks.checkpoint.errors import DamagedCheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Path: TypeAlias = tuple[str | int, ...]
"""Path of a value in a structure: the keys that lead to it."""

_Encode: TypeAlias = Callable[[Any, Path], Any]
"""Encodes a value that isn't plain data, or returns NotImplemented."""


@dataclass
class EncodedState:
    """A state dict as JSON and tensors.

    Attributes:
        shared: JSON of the values that are equal on all ranks.
        local: JSON of this rank's RankLocal values, by path in the state.
        tensors: Tensors by name, including those in RankLocal values.
        paths: Path of each tensor in the state, by name.
    """

    shared: Any = None
    local: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)


def encode(state: Any, rank: int) -> EncodedState:
    """Encode a state dict.

    Args:
        state: Plain data, tensors and RankLocal values.
        rank: This rank; names of tensors in RankLocal values begin with it.

    Raises:
        TypeError: If a value isn't plain data; it names the path.
        ValueError: If two tensors would get the same name.
    """
    from torch import Tensor

    from dream_trainer.callbacks import RankLocal

    result = EncodedState()

    def encode_tensor(value: Any, path: Path) -> Any:
        if not isinstance(value, Tensor):
            return _encode_torch_type(value, path)
        name = ".".join(map(str, path))
        if name in result.tensors:
            raise ValueError(
                f"two tensors of the state would be called {name!r}; rename a key with a dot in it"
            )
        result.tensors[name], result.paths[name] = value.detach(), path
        return {"$tensor": name}

    def encode_other(value: Any, path: Path) -> Any:
        if type(value) is not RankLocal:
            return encode_tensor(value, path)
        name = ".".join(map(str, path))
        if name in result.local:
            raise ValueError(f"two values of the state are at {name!r}; rename a key")
        result.local[name] = _encode(value.value, (f"rank-{rank:05d}", *path), encode_tensor)
        return {"$rank_local": name}

    result.shared = _encode(state, (), encode_other)
    return result


def encode_plain(value: Any) -> Any:
    """Encode plain data, sizes, dtypes and devices as JSON.

    Raises:
        TypeError: If a value is something else; it names the path.
    """
    return _encode(value, (), _encode_torch_type)


def decode(document: Any, tensors: Mapping[str, Tensor], local: Mapping[str, Any]) -> Any:
    """Decode a state dict. RankLocal values are returned unwrapped.

    Args:
        document: `EncodedState.shared` or a part of it.
        tensors: Tensors by name.
        local: `EncodedState.local` of a rank.

    Raises:
        DamagedCheckpointError: If the document is malformed or has a dangling reference.
    """
    references = {
        "$tensor": tensors.__getitem__,
        "$rank_local": lambda name: decode(local[name], tensors, {}),
    }
    return _decode(document, {**_LEAVES, **references})


def decode_plain(document: Any) -> Any:
    """Decode what `encode_plain` returned.

    Raises:
        DamagedCheckpointError: If it is malformed.
    """
    return _decode(document, _LEAVES)


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


def _encode(value: Any, path: Path, encode_other: _Encode) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is int or kind is str:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def inner(item: Any, key: str | int) -> Any:
        return _encode(item, (*path, key), encode_other)

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
    encoded = encode_other(value, path)
    if encoded is NotImplemented:
        place = "state" + "".join(f"[{key!r}]" for key in path)
        raise TypeError(
            f"the state holds a {kind.__module__}.{kind.__qualname__} at {place}, which can't be "
            "saved without pickling; make it plain data: numbers, strings, bytes, tensors, and "
            "lists, tuples, sets and dicts of them"
        )
    return encoded


def _encode_torch_type(value: Any, path: Path) -> Any:
    import torch

    if type(value) is torch.Size:
        return {"$size": list(value)}
    if type(value) is torch.dtype:
        return {"$dtype": str(value).removeprefix("torch.")}
    if type(value) is torch.device:
        return {"$device": str(value)}
    return NotImplemented


def _decode(document: Any, leaves: Mapping[str, Callable[[Any], Any]]) -> Any:
    if isinstance(document, list):
        return [_decode(item, leaves) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: _decode(value, leaves) for key, value in document.items()}
    content = document[tag]
    try:
        if tag in _CONTAINERS:
            return _CONTAINERS[tag]([_decode(item, leaves) for item in content])
        return leaves[tag](content)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedCheckpointError(f"{{{tag!r:.40}: {content!r:.80}}}: {error!r:.200}") from error


def _size(sizes: list[int]) -> torch.Size:
    import torch

    return torch.Size(sizes)


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def _device(name: str) -> torch.device:
    import torch

    return torch.device(name)


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
    "$counter": lambda pairs: Counter(dict(pairs)),
}
_LEAVES: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
    "$complex": lambda parts: complex(float(parts[0]), float(parts[1])),
    "$size": _size,
    "$dtype": _dtype,
    "$device": _device,
}
