"""Which checkpoints to keep and which to resume from. Pure: a catalog in, checkpoints out."""

from __future__ import annotations

import json
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
class Choice:
    """Which checkpoint of a directory to load.

    Attributes:
        which: "last" is the newest, "best" the one with the best metric, "min" or "max" the one
            with the lowest or highest, a number the one of that step.
        monitor: Metric of "best", "min" and "max".
        mode: Whether "best" means low or high.
        argument: Name of the argument that `which` was passed as, for messages; "--" for a flag of
            the command line.
    """

    which: ResumeMode
    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    argument: str = "resume_mode"

    def __str__(self) -> str:
        return self.spelled(self.which)

    def spelled(self, which: ResumeMode) -> str:
        """The argument with another value."""
        if self.argument == "--":
            return f"--step {which}" if isinstance(which, int) else f"--{which}"
        return f"{self.argument}={json.dumps(which)}"


@dataclass(frozen=True)
class Candidates:
    """Checkpoints to try, in order.

    Attributes:
        checkpoints: Empty to start from scratch.
        warnings: Why a better or newer one may be missing.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    warnings: tuple[str, ...] = ()


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


def recorded_choice(
    catalog: Catalog,
    which: ResumeMode,
    monitor: str | None,
    mode: Literal["min", "max"] | None,
    argument: str,
) -> Choice:
    """A choice by the metric that the newest checkpoint records, unless one is given.

    Raises:
        CheckpointError: If the metric, or whether a low or a high one is better, isn't known.
    """
    if which == "last" or isinstance(which, int) or not catalog.checkpoints:
        return Choice(which, argument=argument)
    newest = catalog.checkpoints[-1].manifest
    monitor = monitor or newest.monitor
    if not monitor:
        raise CheckpointError(
            f"{Choice(which, argument=argument)} needs a metric, and the run has recorded none; "
            f"give monitor and mode (the checkpoints have {_metric_names(catalog)})"
        )
    if mode is None and monitor == newest.monitor:
        mode = newest.mode
    choice = Choice(which, monitor, mode or "min", argument)
    if mode is None and which == "best":
        raise CheckpointError(
            f"{choice} by {monitor!r}: the run hasn't recorded whether a low or a high value of it "
            "is better; give mode, min or max"
        )
    return choice


def candidates(catalog: Catalog, choice: Choice) -> Candidates:
    """Checkpoints to try to load, in order.

    "last" prefers the one written last, whatever its step; checkpoints with NaN weights come
    after all others. "best" sorts by the metric. A step selects only that checkpoint.

    Raises:
        CheckpointError: If there are checkpoints but no candidate; a run never starts from
            scratch in that case.
    """
    which = choice.which
    newest_first = tuple(reversed(catalog.checkpoints))
    if isinstance(which, int):
        return Candidates((_of_step(catalog, choice, which),))
    broken = tuple(f"{name}: {what}" for name, what in reversed(catalog.damaged.items()))
    if not newest_first:
        if broken:
            raise CheckpointError(
                f"there are checkpoints, and none is intact ({'; '.join(broken[:3])}); restore one "
                "from a copy, or move them away to start from scratch"
            )
        return Candidates()
    if which == "last":
        clean = tuple(c for c in newest_first if not c.manifest.has_nan)
        with_nan = tuple(c for c in newest_first if c.manifest.has_nan)
        passed_over = tuple(
            f"{c.name} has NaN in its weights and isn't used; {choice.spelled(c.step)} would still "
            "load it"
            for c in with_nan
            if clean and c.manifest.seq > clean[0].manifest.seq
        )
        newest_step = (clean or newest_first)[0].step
        newer = (text for text in broken if _named_step(text) > newest_step)
        not_used = tuple(f"{text}; it isn't used" for text in newer)
        return Candidates((*clean, *with_nan), (*not_used, *passed_over))
    ranked = best_first(
        catalog.checkpoints, choice.monitor, choice.mode if which == "best" else which
    )
    if not ranked:
        raise CheckpointError(
            f"{choice} uses {choice.monitor!r}, and none of the {len(newest_first)} checkpoints "
            f"has it as a number (they have {_metric_names(catalog)}); set monitor to one of "
            f"these, or {choice.spelled('last')}"
        )
    warnings = [f"{text}; it isn't used" for text in broken]
    newest, num_left = newest_first[0].manifest, len(newest_first)
    if not newest.keeps_best and newest.seq > num_left:
        warnings.append(
            f"{choice} is the best of the {num_left} checkpoints that are left; a run with "
            "keep_top_k=0 doesn't keep its best"
        )
    return Candidates(tuple(ranked), tuple(warnings))


def _of_step(catalog: Catalog, choice: Choice, step: int) -> Checkpoint:
    found = catalog.of_step(step)
    if found is not None:
        return found
    name = file_names.checkpoint_name(step)
    if name in catalog.damaged:
        raise CheckpointError(
            f"{choice} asks for {name}, which is damaged: {catalog.damaged[name]}; "
            f"choose another step, or {choice.spelled('last')}"
        )
    steps = ", ".join(str(c.step) for c in catalog.checkpoints[-10:]) or "none"
    raise CheckpointError(
        f"{choice} asks for {name}, which doesn't exist; the newest steps are: "
        f"{steps}; choose one of them, or {choice.spelled('last')}"
    )


def _metric_names(catalog: Catalog) -> str:
    names = sorted({name for c in catalog.checkpoints for name in c.metrics})
    return ", ".join(names) or "no metrics"


def _named_step(text: str) -> int:
    return file_names.step_of(text.split(":", 1)[0]) or 0
