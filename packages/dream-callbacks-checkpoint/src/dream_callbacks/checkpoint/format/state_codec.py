"""Encode a state dict as JSON and tensors, and decode it: plain data and torch types.

The JSON refers to a tensor by its name, and to a RankLocal value by its path in the rank's file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dream_callbacks.checkpoint.format import json_codec
from dream_callbacks.checkpoint.format.json_codec import Path, spelled
from dream_trainer.callbacks import RankLocal


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
    result = EncodedState()

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
    """Encode plain data, sizes, dtypes and devices as JSON."""
    return _encode(value, (), _no_tensor, _no_local)


def decode_plain(document: Any) -> Any:
    """Decode what `encode_plain` returned."""
    return decode(document, {}, {})


def decode(document: Any, tensors: Mapping[str, Tensor], local: Mapping[str, Any]) -> Any:
    """Decode a state dict. RankLocal values are returned unwrapped.

    Args:
        document: `EncodedState.shared` or a part of it.
        tensors: Tensors by name.
        local: `EncodedState.local` of a rank.

    Raises:
        DamagedCheckpointError: If the document is malformed or has a dangling reference.
    """
    foreign = {
        "$tensor": tensors.__getitem__,
        "$rank_local": lambda name: decode(local[name], tensors, {}),
        "$size": torch.Size,
        "$dtype": _dtype,
        "$device": torch.device,
    }
    return json_codec.decode(document, foreign)


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
    def foreign(value: Any, path: Path) -> Any:
        if isinstance(value, Tensor):
            return add_tensor(value, path)
        if type(value) is RankLocal:
            return add_local(value.value, path)
        if type(value) is torch.Size:
            return {"$size": list(value)}
        if type(value) is torch.dtype:
            return {"$dtype": str(value).removeprefix("torch.")}
        if type(value) is torch.device:
            return {"$device": str(value)}
        return NotImplemented

    return json_codec.encode(value, path, foreign)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    return dtype


def _no_tensor(tensor: Tensor, path: Path) -> Any:
    raise TypeError(f"a tensor at {spelled(path)} where only numbers and text are expected")


def _no_local(value: Any, path: Path) -> Any:
    raise TypeError(f"a RankLocal at {spelled(path)}, where there can't be one")
