"""What to load: candidates in order. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from dream_callbacks.checkpoint.catalog import Catalog, Checkpoint
from dream_callbacks.checkpoint.errors import CheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.retention import best_first

ResumeMode: TypeAlias = Literal["last", "best", "min", "max"] | int


@dataclass(frozen=True)
class Candidates:
    """Checkpoints to try, in order.

    Attributes:
        checkpoints: None to begin from scratch.
        passed_over: Why newer ones aren't among the first.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    passed_over: tuple[str, ...] = ()


def candidates(
    catalog: Catalog, resume_mode: ResumeMode, monitor: str, mode: Literal["min", "max"]
) -> Candidates:
    """The checkpoints to try.

    "last" is the one written last, whatever its step; one with NaN in its weights only if there
    is no other. "best" goes by the metric; a step means this one and no other.

    Raises:
        CheckpointError: If there are checkpoints, and none that fits; a run never begins from
            scratch because of that.
    """
    newest_first = tuple(reversed(catalog.checkpoints))
    if isinstance(resume_mode, int):
        return Candidates((_of_step(catalog, resume_mode),))
    broken = tuple(f"{name}: {what}" for name, what in reversed(catalog.damaged.items()))
    if not newest_first:
        if broken:
            raise CheckpointError(
                f"there are checkpoints, and none is whole ({'; '.join(broken[:3])}); restore one "
                "from a copy, or move them away to begin from scratch"
            )
        return Candidates()
    if resume_mode == "last":
        clean = tuple(c for c in newest_first if not c.manifest.has_nan)
        with_nan = tuple(c for c in newest_first if c.manifest.has_nan)
        passed_over = tuple(
            f"{c.name} has NaN in its weights; resume_mode={c.step} would take it all the same"
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
            f"resume_mode={resume_mode!r} goes by {monitor!r}, and none of the "
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
        f"resume_mode={step} asks for {name}, which isn't there; the newest steps that are: "
        f'{steps}; choose one of them, or resume_mode="last"'
    )


def _named_step(text: str) -> int:
    return file_names.step_of(text.split(":", 1)[0]) or 0
