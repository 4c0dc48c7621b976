"""Plain data in callback states, and RankLocal for values that differ per rank."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

_PLAIN_LEAVES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    torch.Size,
    torch.dtype,
    torch.device,
    Tensor,
    nn.Parameter,
)
_PLAIN_SEQUENCES = (list, tuple, set)
_PLAIN_MAPPINGS = (dict, OrderedDict, Counter)


class RankLocal(Generic[T]):
    """A value in a state that differs per rank, such as a position in the data.

    A checkpoint saves it for each rank; `load_state_dict` gets this rank's bare value.
    All other values must be equal on all ranks: only one rank's are saved.

    Args:
        value: Plain data.
    """

    def __init__(self, value: T) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"RankLocal({self.value!r})"


def without_rank_local(state: Any) -> Any:
    """The state with each RankLocal replaced by its value."""
    kind = type(state)
    if kind is RankLocal:
        return without_rank_local(state.value)
    if kind in _PLAIN_MAPPINGS:
        return kind({key: without_rank_local(value) for key, value in state.items()})
    if kind in (list, tuple):
        return kind(without_rank_local(value) for value in state)
    return state


def values_not_plain(state: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values in a state that `torch.load(weights_only=True)` would refuse.

    Yields:
        The path in Python syntax, such as `["history"][3]`, and the value.
    """
    kind = type(state)
    if kind in _PLAIN_LEAVES or _is_sharded(state):
        return
    if kind is RankLocal:
        yield from values_not_plain(state.value, path)
    elif kind in _PLAIN_MAPPINGS:
        for key, value in state.items():
            yield from values_not_plain(key, f"{path} (the key {key!r})")
            yield from values_not_plain(value, f"{path}[{key!r}]")
    elif kind in _PLAIN_SEQUENCES:
        for index, value in enumerate(state):
            yield from values_not_plain(value, f"{path}[{index}]")
    else:
        yield path, state


def _is_sharded(value: Any) -> bool:
    if not isinstance(value, Tensor):
        return False
    from torch.distributed.tensor import DTensor

    return type(value) is DTensor
