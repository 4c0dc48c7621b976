"""Which checkpoints to keep and which to resume from. Pure: a catalog in, checkpoints out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.format import file_names

if TYPE_CHECKING:
    from dream_callbacks.checkpoint.catalog import Catalog, Checkpoint

ResumeMode: TypeAlias = Literal["last", "best", "min", "max"] | int


@dataclass(frozen=True)
class KeepRules:
    """Retention rules; a checkpoint is kept if any rule selects it.

    Args:
        last: Number of newest checkpoints to keep; None for all.
        top_k: Number of best checkpoints to keep.
        every: Keep the first checkpoint of each interval of this many steps; None for no rule.
        monitor: Metric that ranks checkpoints.
        mode: Whether a low or a high metric is better.
    """

    last: int | None = 3
    top_k: int = 0
    every: int | None = None
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"


@dataclass(frozen=True)
class Candidates:
    """Checkpoints to try, in order.

    Attributes:
        checkpoints: Empty to start from scratch.
        passed_over: Why newer checkpoints are not tried first.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    passed_over: tuple[str, ...] = ()


def best_first(
    checkpoints: Sequence[Checkpoint], monitor: str, mode: Literal["min", "max"]
) -> list[Checkpoint]:
    """Checkpoints whose metric is a number, best first; ties: newest first."""
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
    """Checkpoints that no rule keeps, oldest first.

    The newest checkpoint and the newest one without NaN are always kept.

    Args:
        checkpoints: Intact checkpoints, oldest first; damaged ones neither count nor are deleted.
        rules: Retention rules.
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
    """Whether a checkpoint with this metric would be among the `top_k` best."""
    if value != value:  # NaN
        return False
    best = best_first(checkpoints, rules.monitor, rules.mode)[: rules.top_k]
    if len(best) < rules.top_k:
        return True
    worst = best[-1].metric(rules.monitor) if best else None
    if worst is None:
        return False
    return value <= worst if rules.mode == "min" else value >= worst


def candidates(
    catalog: Catalog, resume_mode: ResumeMode, monitor: str, mode: Literal["min", "max"]
) -> Candidates:
    """Checkpoints to try to restore, in order.

    "last" prefers the one written last, whatever its step; checkpoints with NaN weights come
    after all others. "best" sorts by the metric. A step selects only that checkpoint.

    Raises:
        CheckpointError: If there are checkpoints but no candidate; a run never starts from
            scratch in that case.
    """
    newest_first = tuple(reversed(catalog.checkpoints))
    if isinstance(resume_mode, int):
        return Candidates((_of_step(catalog, resume_mode),))
    broken = tuple(f"{name}: {what}" for name, what in reversed(catalog.damaged.items()))
    if not newest_first:
        if broken:
            raise CheckpointError(
                f"there are checkpoints, and none is intact ({'; '.join(broken[:3])}); restore one "
                "from a copy, or move them away to start from scratch"
            )
        return Candidates()
    if resume_mode == "last":
        clean = tuple(c for c in newest_first if not c.manifest.has_nan)
        with_nan = tuple(c for c in newest_first if c.manifest.has_nan)
        passed_over = tuple(
            f"{c.name} has NaN in its weights; resume_mode={c.step} would still resume from it"
            for c in with_nan
            if clean and c.manifest.seq > clean[0].manifest.seq
        )
        newer_broken = tuple(
            text for text in broken if _named_step(text) > (clean or newest_first)[0].step
        )
        return Candidates((*clean, *with_nan), (*newer_broken, *passed_over))
    ranked = best_first(
        catalog.checkpoints, monitor, mode if resume_mode == "best" else resume_mode
    )
    if not ranked:
        known = sorted({name for c in catalog.checkpoints for name in c.metrics})
        raise CheckpointError(
            f"resume_mode={resume_mode!r} uses {monitor!r}, and none of the "
            f"{len(newest_first)} checkpoints has it as a number (they have "
            f"{', '.join(known) or 'no metrics'}); set monitor to one of these, or "
            'resume_mode="last"'
        )
    return Candidates(tuple(ranked))


def _of_step(catalog: Catalog, step: int) -> Checkpoint:
    found = catalog.of_step(step)
    if found is not None:
        return found
    name = file_names.checkpoint_name(step)
    if name in catalog.damaged:
        raise CheckpointError(
            f"resume_mode={step} asks for {name}, which is damaged: {catalog.damaged[name]}; "
            'choose another step, or resume_mode="last"'
        )
    steps = ", ".join(str(c.step) for c in catalog.checkpoints[-10:]) or "none"
    raise CheckpointError(
        f"resume_mode={step} asks for {name}, which doesn't exist; the newest steps are: "
        f'{steps}; choose one of them, or resume_mode="last"'
    )


def _named_step(text: str) -> int:
    return file_names.step_of(text.split(":", 1)[0]) or 0
