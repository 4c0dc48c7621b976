"""Catalog: list the checkpoints of a directory, verify their files, choose one to restore."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum, Manifest, sealed, unsealed
from dream_callbacks.checkpoint.format.state_codec import decode_plain, encode_plain
from dream_callbacks.checkpoint.io.filesystem import Filesystem, is_url
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.retention import Candidates, Choice, candidates

if TYPE_CHECKING:
    from dream_trainer.world import Coordination

logger = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 1 << 26

_MAX_LISTINGS = 10
"""Attempts to choose a checkpoint while a run deletes what was chosen."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with a valid manifest. `damage_of` verifies its other files.

    Attributes:
        name: Name of its folder.
        manifest: Its manifest.
        late_metrics: Results reported after the save.
    """

    name: str
    manifest: Manifest
    late_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def metrics(self) -> dict[str, float]:
        """Validation results of these weights."""
        return {**self.manifest.metrics, **self.late_metrics}

    def metric(self, name: str) -> float | None:
        """A metric; None if it is missing or NaN."""
        value = self.metrics.get(name)
        return None if value is None or math.isnan(value) else value


@dataclass(frozen=True)
class Catalog:
    """The checkpoints of a directory.

    Attributes:
        checkpoints: In the order in which they were written, oldest first.
        damaged: Problem of each folder named like a checkpoint without a valid manifest, by name.
    """

    checkpoints: tuple[Checkpoint, ...] = ()
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def next_seq(self) -> int:
        return 1 + max((c.manifest.seq for c in self.checkpoints), default=0)

    def of_step(self, step: int) -> Checkpoint | None:
        return next((c for c in self.checkpoints if c.step == step), None)


def filesystem_at(path: str | Path) -> Filesystem:
    """The checkpoint directory at a path or URL.

    Raises:
        ValueError: If it is a URL with one slash, as produced by pathlib.
        ImportError: If it is a URL and a library that it needs isn't installed.
    """
    if not is_url(path):
        return LocalFilesystem(Path(path))
    if "://" not in str(path):
        raise ValueError(
            f"{str(path)!r} has one slash after its colon, as pathlib makes it of a URL; give the "
            "URL as text, to CheckpointParameters(root_dir=…): a trainer's own root_dir is a path"
        )
    from dream_callbacks.checkpoint.io.fsspec_filesystem import FsspecFilesystem

    return FsspecFilesystem(str(path))


def directory_at(path: str | Path) -> tuple[str | Path, int | None]:
    """Find the checkpoint directory at a path; also the step if the path is a checkpoint.

    Args:
        path: A checkpoint directory, its run directory, or a checkpoint in it; or a URL of one
            of them.

    Raises:
        CheckpointError: If it is none of them.
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
        names = filesystem_at(place).entries()
        if file_names.LOCK in names or any(file_names.step_of(each) is not None for each in names):
            return place, None
    raise CheckpointError(
        f"there are no checkpoints in {url}; give the URL of a run directory, or of the folder "
        "checkpoints in it"
    )


def read_catalog(filesystem: Filesystem) -> Catalog:
    """Read all manifests of a directory; an empty catalog if it doesn't exist."""
    names = filesystem.entries()
    with_metrics = {file_names.step_of_metrics(name) for name in names}
    checkpoints, damaged = [], {}
    for name in names:
        step = file_names.step_of(name)
        if step is None:
            continue
        try:
            manifest = _read_manifest(filesystem, name)
        except (DamagedCheckpointError, OSError) as error:
            damaged[name] = str(error)
            continue
        late = _read_late_metrics(filesystem, manifest) if step in with_metrics else {}
        checkpoints.append(Checkpoint(name, manifest, late))
    if damaged:  # but not what a run deleted while its manifest was read
        remaining = filesystem.entries()
        damaged = {name: what for name, what in damaged.items() if name in remaining}
    checkpoints.sort(key=lambda checkpoint: (checkpoint.manifest.seq, checkpoint.step))
    return Catalog(tuple(checkpoints), dict(sorted(damaged.items())))


def _read_manifest(filesystem: Filesystem, name: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        DamagedCheckpointError: If it is missing or corrupt.
    """
    if not filesystem.is_folder(name):
        raise DamagedCheckpointError("it isn't a folder")
    data = filesystem.read(name, file_names.MANIFEST, _MAX_MANIFEST_BYTES)
    try:
        manifest = Manifest.decode(data)
    except DamagedCheckpointError as error:
        text = str(error)
        prefix = "" if text.startswith(file_names.MANIFEST) else f"{file_names.MANIFEST}: "
        raise DamagedCheckpointError(f"{prefix}{text}") from error
    if manifest.step != file_names.step_of(name):
        raise DamagedCheckpointError(f"it is the checkpoint of step {manifest.step}")
    return manifest


def late_metrics_document(manifest: Manifest, metrics: dict[str, float]) -> bytes:
    """Content of the file of late metrics."""
    return sealed({"run": manifest.run, "seq": manifest.seq, "metrics": encode_plain(metrics)})


def _read_late_metrics(filesystem: Filesystem, manifest: Manifest) -> dict[str, float]:
    """Metrics reported after a save; none, with a warning, if they can't be read."""
    name = file_names.metrics_name(manifest.step)
    try:
        document = unsealed(filesystem.read("", name, _MAX_MANIFEST_BYTES))
        if (document["run"], document["seq"]) != (manifest.run, manifest.seq):
            return {}  # of an earlier checkpoint of the same step
        return {str(k): float(v) for k, v in decode_plain(document["metrics"]).items()}
    except (DamagedCheckpointError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning(
            "%s/%s can't be used: %s; the checkpoint is treated as one without metrics",
            filesystem,
            name,
            error,
        )
        return {}


def damage_of(
    filesystem: Filesystem,
    checkpoint: Checkpoint,
    *,
    checksums: bool,
    share: tuple[int, int] = (0, 1),
) -> list[str]:
    """Problems of a checkpoint's files; empty if they are intact.

    Args:
        filesystem: Directory of the checkpoint.
        checkpoint: The checkpoint to verify.
        checksums: Compare checksums; otherwise only sizes.
        share: (i, n) to verify the i-th of n parts of the files.
    """
    wrong: list[str] = []
    part, num_parts = share
    files = sorted(checkpoint.manifest.files.items(), key=lambda item: (item[1].num_bytes, item[0]))
    for name, saved in files[part::num_parts]:
        problem = _damage_of_file(filesystem, checkpoint.name, name, saved, checksums=checksums)
        if problem is not None:
            wrong.append(f"{checkpoint.name}/{problem}")
    return wrong


def _damage_of_file(
    filesystem: Filesystem, folder: str, name: str, saved: FileSum, *, checksums: bool
) -> str | None:
    num_bytes = filesystem.size(folder, name)
    if num_bytes is None:
        return f"{name} is missing, or isn't a regular file"
    if num_bytes != saved.num_bytes:
        return f"{name} has {num_bytes} bytes, and {saved.num_bytes} were written"
    if not checksums:
        return None
    try:
        found = filesystem.sums(folder, name)
    except DamagedCheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{name} can't be read: {error}"
    return None if found == saved else f"{name}: its checksum doesn't match"


def choose(
    filesystem: Filesystem,
    catalog: Catalog,
    ranks: Coordination,
    choice: Choice,
    *,
    verify: bool,
    held: contextlib.ExitStack | None = None,
) -> Checkpoint | None:
    """Choose the first candidate with intact files. Rank 0 decides, all ranks verify. Collective.

    Args:
        filesystem: The checkpoint directory.
        catalog: Its checkpoints; only rank 0's is used.
        ranks: All ranks of the run.
        choice: Which checkpoint to prefer.
        verify: Compare checksums; otherwise only sizes.
        held: Protects the checkpoint from deletion by another run until it is closed. Not needed
            while holding the directory's lock.

    Returns:
        The checkpoint; None if there are none.

    Raises:
        CheckpointError: If there are candidates and all are damaged.
    """

    def damage(checkpoint: Checkpoint) -> list[str]:
        problems = _held(filesystem, checkpoint, ranks, held) if held is not None else []
        return problems or _damage_seen(filesystem, checkpoint, ranks, checksums=verify)

    found = ranks.on_rank_zero(lambda: candidates(catalog, choice))
    return _first_intact(filesystem, found, choice, damage, warns=ranks.is_global_zero)


def choose_alone(
    filesystem: Filesystem,
    choice_in: Callable[[Catalog], Choice],
    *,
    verify: bool,
    held: contextlib.ExitStack,
) -> Checkpoint | None:
    """As `choose`, in one process, while a run may save and delete. Not collective.

    Args:
        filesystem: The checkpoint directory.
        choice_in: Returns which checkpoint to prefer.
        verify: Compare checksums; otherwise only sizes.
        held: Protects the checkpoint from deletion by runs on this machine until it is closed.
    """

    def damage(checkpoint: Checkpoint) -> list[str]:
        try:
            held.enter_context(filesystem.reading(checkpoint.name))
        except DamagedCheckpointError:
            raise _DeletedError from None
        problems = damage_of(filesystem, checkpoint, checksums=verify)
        if problems and checkpoint.name not in filesystem.entries():
            raise _DeletedError
        return problems

    for _ in range(_MAX_LISTINGS):
        catalog = read_catalog(filesystem)
        choice = choice_in(catalog)
        with contextlib.suppress(_DeletedError):
            found = candidates(catalog, choice)
            return _first_intact(filesystem, found, choice, damage, warns=True)
    raise CheckpointError(
        f"checkpoints in {filesystem} were deleted {_MAX_LISTINGS} times before they were read; "
        "raise keep_last in the run, or copy one and load the copy"
    )


class _DeletedError(Exception):
    """A checkpoint was deleted since the catalog was read."""


def _first_intact(
    filesystem: Filesystem,
    found: Candidates,
    choice: Choice,
    damage: Callable[[Checkpoint], list[str]],
    *,
    warns: bool,
) -> Checkpoint | None:
    if warns:
        for text in found.warnings:
            logger.warning("%s: %s", filesystem, text)
    problems: list[str] = []
    for checkpoint in found.checkpoints:
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        problems.append("; ".join(wrong[:3]))
        if warns:
            logger.warning(
                "%s is damaged: %s; trying the previous one", checkpoint.name, problems[-1]
            )
    if not found.checkpoints:
        return None
    raise CheckpointError(
        f"none of the checkpoints in {filesystem} that {choice} allows is intact "
        f"({'; '.join(problems[:3])}); restore one from a copy, choose another step, or move them "
        "away to start from scratch"
    )


def _damage_seen(
    filesystem: Filesystem, checkpoint: Checkpoint, ranks: Coordination, *, checksums: bool
) -> list[str]:
    """Problems of a checkpoint's files; each rank verifies a share. Collective."""
    share = (ranks.rank, ranks.world_size)
    found = ranks.gather(
        lambda: damage_of(filesystem, checkpoint, checksums=checksums, share=share)
    )
    return [problem for part in found for problem in part]


def _held(
    filesystem: Filesystem, checkpoint: Checkpoint, ranks: Coordination, held: contextlib.ExitStack
) -> list[str]:
    """Protect a checkpoint from deletion; the first problem, if any. Collective."""

    def hold() -> str | None:
        try:
            held.enter_context(filesystem.reading(checkpoint.name))
        except DamagedCheckpointError as error:
            return str(error)
        return None

    return [problem for problem in ranks.gather(hold) if problem is not None][:1]
