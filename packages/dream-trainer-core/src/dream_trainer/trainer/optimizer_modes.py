"""Optimizers with `train()` and `eval()`, such as schedule-free ones (Defazio et al., 2024).

Training uses other weights than evaluation, between which the optimizer exchanges those of the
model. States have the weights of training, so that resuming is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer


def train(optimizers: Iterable[Optimizer]) -> None:
    """Put the weights of training into the models."""
    for optimizer in _with_modes(optimizers):
        optimizer.train()


@contextmanager
def evaluating(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Inside, the models have the weights to evaluate; afterwards, exactly those of training.

    Keeps a copy of the latter: to compute them again would round.
    """
    exchanged = _with_modes(optimizers)
    kept = [
        (parameter, parameter.detach().clone())
        for optimizer in exchanged
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    for optimizer in exchanged:
        optimizer.eval()
    try:
        yield
    finally:
        train(exchanged)
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def refuse_other_weights(optimizers: Iterable[Optimizer]) -> None:
    """Raise if weights alone, without the optimizer's state, aren't those to evaluate.

    Raises:
        RuntimeError: If an optimizer has modes.
    """
    for optimizer in _with_modes(optimizers):
        raise RuntimeError(
            f"a checkpoint has the weights that {type(optimizer).__name__} trains with; those to "
            "evaluate follow from the state of the optimizer: resume from the checkpoint, and call "
            "validate() without checkpoint=…"
        )


def _with_modes(optimizers: Iterable[Optimizer]) -> list[Any]:
    return [
        each
        for each in optimizers
        if callable(getattr(each, "train", None)) and callable(getattr(each, "eval", None))
    ]
