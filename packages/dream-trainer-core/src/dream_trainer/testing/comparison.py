"""Comparison of callback and model states."""

from __future__ import annotations

import math
from typing import Any

import torch

from dream_trainer.callbacks.plain_data import RankLocal


def equal(a: Any, b: Any) -> bool:
    """Whether two states are bit-identical; NaN equals NaN."""
    if isinstance(a, RankLocal) and isinstance(b, RankLocal):
        return equal(a.value, b.value)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return bool(a == b)


def with_rank_local_masked(state: Any) -> Any:
    """The state with "per rank" in place of each value that may differ between ranks."""
    if isinstance(state, RankLocal):
        return "per rank"
    if isinstance(state, dict):
        return {key: with_rank_local_masked(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(with_rank_local_masked, state))
    return state
