"""Divergence: ends a run whose weights are no longer finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from dream_trainer.world.dtensors import local_part

if TYPE_CHECKING:
    from dream_trainer.trainer.base import BaseTrainer

logger = logging.getLogger(__name__)


def refuse_divergence(trainer: BaseTrainer, means: Mapping[str, Any], what: str) -> None:
    """Raise if means over an epoch aren't finite because the weights aren't.

    Checks the weights only when a mean is NaN or infinite, so it costs nothing otherwise. If the
    weights are finite, because a bad batch was skipped for example, it warns.
    Collective where a mean isn't finite: `means` are equal on all ranks.

    Args:
        trainer: Its weights are checked.
        means: Epoch means by name.
        what: Name of the step that reported them.

    Raises:
        FloatingPointError: On all ranks, if a weight is NaN or infinite on one.
    """
    odd = {
        name: value
        for name, value in means.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if not odd:
        return
    said = ", ".join(f"{name}={value}" for name, value in odd.items())
    where = f"at step {trainer.global_step} (epoch {trainer.current_epoch}), {what} reports {said}"
    broken = _not_finite(trainer)
    if trainer.world.any_rank(bool(broken)):
        names = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if broken[3:] else "")
        raise FloatingPointError(
            f"{where} on average, and weights are no longer finite: "
            f"{names or 'those of another rank'}. Training has diverged: resume from an earlier "
            "checkpoint with a lower learning rate, or set gradient_clip_val"
        )
    if trainer.world.is_global_zero:
        logger.warning("%s on average; all weights are finite, so training continues", where)


@torch.no_grad()
def _not_finite(trainer: BaseTrainer) -> list[str]:
    return [
        f"{model_name}.{name}"
        for model_name, model in trainer.named_models().items()
        for name, parameter in model.named_parameters()
        if not bool(local_part(parameter).isfinite().all())
    ]
