"""What to keep. Pure: rules in, names out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dream_callbacks.checkpoint.catalog import Checkpoint


@dataclass(frozen=True)
class KeepRules:
    """Which checkpoints stay; one that any rule names does.

    Args:
        last: The newest ones; None for all.
        top_k: The best ones.
        every: In each span of so many steps, the first one. None for no such rule.
        monitor: The metric that tells which are best.
        mode: Whether a low or a high metric is better.
    """

    last: int | None = 3
    top_k: int = 0
    every: int | None = None
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"


def best_first(
    checkpoints: Sequence[Checkpoint], monitor: str, mode: Literal["min", "max"]
) -> list[Checkpoint]:
    """Those with a metric that is a number, best first; of equal ones the newest first."""
    sign = 1 if mode == "min" else -1
    scored = [(c.metric(monitor), c) for c in checkpoints]
    return [
        checkpoint
        for _, checkpoint in sorted(
            ((value, c) for value, c in scored if value is not None),
            key=lambda pair: (sign * pair[0], -pair[1].manifest.seq),
        )
    ]


def to_delete(checkpoints: Sequence[Checkpoint], rules: KeepRules) -> list[Checkpoint]:
    """The checkpoints that no rule keeps, oldest first.

    The newest one stays whatever the rules say, and the newest one without NaN.

    Args:
        checkpoints: Whole ones, oldest first; torn ones neither count nor are deleted.
        rules: What to keep.
    """
    if rules.last is None:
        return []
    keep = {c.name for c in checkpoints[-max(rules.last, 1) :]}
    keep |= {c.name for c in [c for c in checkpoints if not c.manifest.has_nan][-1:]}
    keep |= {c.name for c in best_first(checkpoints, rules.monitor, rules.mode)[: rules.top_k]}
    if rules.every is not None:
        first_of_span: dict[int, Checkpoint] = {}
        for checkpoint in sorted(checkpoints, key=lambda c: c.step):
            first_of_span.setdefault(checkpoint.step // rules.every, checkpoint)
        keep |= {c.name for span, c in first_of_span.items() if span > 0}
    return [c for c in checkpoints if c.name not in keep]


def is_among_best(value: float, checkpoints: Sequence[Checkpoint], rules: KeepRules) -> bool:
    """Whether a checkpoint with this metric would be one of the best to keep."""
    if value != value:  # not a number
        return False
    best = best_first(checkpoints, rules.monitor, rules.mode)[: rules.top_k]
    if len(best) < rules.top_k:
        return True
    worst = best[-1].metric(rules.monitor) if best else None
    if worst is None:
        return False
    return value <= worst if rules.mode == "min" else value >= worst
