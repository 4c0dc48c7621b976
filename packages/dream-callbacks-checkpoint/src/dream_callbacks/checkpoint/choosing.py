"""The checkpoint to read: rank 0 decides, all ranks verify it, and damage leads to the next."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dream_callbacks.checkpoint.catalog import Catalog, Checkpoint, damage_of
from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.io.filesystem import Directory, directory_of, is_url
from dream_callbacks.checkpoint.resume import ResumeMode, candidates

if TYPE_CHECKING:
    from dream_trainer.world import Coordination

logger = logging.getLogger(__name__)


def choose(
    disk: Directory,
    catalog: Catalog,
    ranks: Coordination,
    resume_mode: ResumeMode,
    monitor: str,
    mode: Literal["min", "max"],
    *,
    verify: bool,
    held: contextlib.ExitStack | None = None,
) -> Checkpoint | None:
    """The first candidate whose files are what was written. Collective.

    Args:
        disk: Where.
        catalog: What is there; rank 0's counts.
        ranks: Who decides and verifies.
        resume_mode: Which to prefer.
        monitor: The metric of "best", "min" and "max".
        mode: What "best" means.
        verify: Compare checksums; else sizes alone.
        held: Until it is closed, no other run deletes the checkpoint. Not needed by who has the
            directory's lock.

    Returns:
        The checkpoint; None if there is none at all.

    Raises:
        CheckpointError: If there are some, and none is whole.
    """
    chosen = ranks.on_rank_zero(lambda: candidates(catalog, resume_mode, monitor, mode))
    if ranks.is_global_zero:
        for text in chosen.passed_over:
            logger.warning("%s/%s; not resumed from", disk, text)
    problems: list[str] = []
    for checkpoint in chosen.checkpoints:
        damage = _held(disk, checkpoint, ranks, held) if held is not None else []
        damage = damage or damage_seen(disk, checkpoint, ranks, checksums=verify)
        if not damage:
            return checkpoint
        problems.append("; ".join(damage[:3]))
        if ranks.is_global_zero:
            logger.warning(
                "%s is damaged: %s; trying the one before it", checkpoint.name, problems[-1]
            )
    if not chosen.checkpoints:
        return None
    raise CheckpointError(
        f"none of the checkpoints in {disk} that resume_mode={resume_mode!r} allows is whole "
        f"({'; '.join(problems[:3])}); restore one from a copy, choose another step, or move them "
        "away to begin from scratch"
    )


def damage_seen(
    disk: Directory, checkpoint: Checkpoint, ranks: Coordination, *, checksums: bool
) -> list[str]:
    """What is wrong with a checkpoint's files; each rank looks at some of them. Collective."""
    share = (ranks.rank, ranks.world_size)
    found = ranks.gather(lambda: damage_of(disk, checkpoint, checksums=checksums, share=share))
    return [problem for part in found for problem in part]


def _held(
    disk: Directory, checkpoint: Checkpoint, ranks: Coordination, held: contextlib.ExitStack
) -> list[str]:
    """Keep a checkpoint from being deleted; what kept this from it. Collective."""

    def hold() -> str | None:
        try:
            held.enter_context(disk.reading(checkpoint.name))
        except DamagedCheckpointError as error:
            return str(error)
        return None

    return [problem for problem in ranks.gather(hold) if problem is not None][:1]


def directory_at(path: str | Path) -> tuple[str | Path, int | None]:
    """The checkpoint directory that a user means, and the step if it is one checkpoint.

    Args:
        path: A checkpoint directory, the run directory that it is in, or a checkpoint in it; or
            a URL of one of them.

    Raises:
        CheckpointError: If it is none of them; it says what is there.
    """
    if is_url(path):
        return _directory_at_url(str(path).rstrip("/"))
    path = Path(path).expanduser()
    step = file_names.step_of(path.name)
    if step is not None and path.is_dir():
        return path.parent, step
    for directory in (path, path / "checkpoints"):
        if directory.is_dir() and (
            (directory / file_names.LOCK).exists()
            or any(file_names.step_of(entry.name) is not None for entry in directory.iterdir())
        ):
            return directory, None
    if not path.is_dir():
        raise CheckpointError(f"{path} isn't a directory; give one that checkpoints are in")
    below = sorted(lock.parent for lock in path.glob(f"*/*/*/checkpoints/{file_names.LOCK}"))
    hint = f"; there are checkpoints in {', '.join(map(str, below[:5]))}" if below else ""
    raise CheckpointError(
        f"there are no checkpoints in {path}{hint}; give a run directory, or the folder "
        f"checkpoints in it"
    )


def _directory_at_url(url: str) -> tuple[str, int | None]:
    above, _, name = url.rpartition("/")
    step = file_names.step_of(name)
    if step is not None:
        return above, step
    for place in (url, f"{url}/checkpoints"):
        names = directory_of(place).entries()
        if file_names.LOCK in names or any(file_names.step_of(each) is not None for each in names):
            return place, None
    raise CheckpointError(
        f"there are no checkpoints in {url}; give the URL of a run directory, or of the folder "
        "checkpoints in it"
    )
