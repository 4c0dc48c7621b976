"""Comparing states of callbacks and of models."""

from __future__ import annotations

import math
from typing import Any

import torch

from dream_trainer.callbacks.plain_data import RankLocal


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same, bit for bit; NaN is the same as NaN."""
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


def bare(state: Any) -> Any:
    """The state as a checkpoint gives it back."""
    if isinstance(state, RankLocal):
        return bare(state.value)
    if isinstance(state, dict):
        return {key: bare(value) for key, value in state.items()}
    return type(state)(map(bare, state)) if isinstance(state, (list, tuple)) else state


def without_rank_local(state: Any) -> Any:
    """The state with a mark in place of what may differ between ranks."""
    if isinstance(state, RankLocal):
        return "per rank"
    if isinstance(state, dict):
        return {key: without_rank_local(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(map(without_rank_local, state))
    return state
