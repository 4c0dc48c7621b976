"""Atomic commit and deletion of checkpoints: a crash at any point leaves a usable directory."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Collection

from dream_callbacks.checkpoint.errors import format_bytes
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import Manifest
from dream_callbacks.checkpoint.io.filesystem import Filesystem, Lock

logger = logging.getLogger(__name__)


_SPARE_BYTES = 1 << 20
"""Space for everything except tensors."""

_VISIBLE_WITHIN_S = 60.0
"""How long a shared file system may take to show a folder on another machine."""


def begin(filesystem: Filesystem, step: int, run: str, num_bytes: int) -> str:
    """Create the temporary folder of a checkpoint; its name.

    Args:
        filesystem: The checkpoint directory.
        step: Step of the checkpoint.
        run: Id of this start of the script.
        num_bytes: Size of its tensors.

    Raises:
        OSError: If there is too little free space.
    """
    free = filesystem.free_bytes()
    if free < num_bytes + _SPARE_BYTES:
        raise OSError(
            f"no space left for it: it needs {format_bytes(num_bytes + _SPARE_BYTES)}, and "
            f"{format_bytes(free)} are free"
        )
    name = file_names.temporary_name(step, run)
    filesystem.delete(name)  # left by a failed attempt
    filesystem.make(name)
    return name


def wait_until_visible(filesystem: Filesystem, temporary: str) -> None:
    """Wait until this rank sees the folder that rank 0 created.

    Raises:
        FileNotFoundError: If it doesn't within a minute.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while not filesystem.is_folder(temporary):
        if time.monotonic() > deadline:
            raise FileNotFoundError(
                f"rank 0 made {filesystem}/{temporary}, and this rank can't see it; all ranks must "
                "share the file system that root_dir is on"
            )
        time.sleep(0.05)


def publish(
    filesystem: Filesystem,
    temporary: str,
    manifest: Manifest,
    lock: Lock,
    unsynced: Collection[str],
) -> str:
    """Commit a written folder by renaming it.

    Replaces an existing checkpoint of the same step, which exists after resuming from an earlier
    step.

    Args:
        filesystem: The checkpoint directory.
        temporary: The written folder.
        manifest: Its manifest.
        lock: The held lock.
        unsynced: Files to sync; all others are synced already.

    Returns:
        The name of the checkpoint, which is durable.

    Raises:
        CheckpointError: If the lock was lost.
    """
    filesystem.write(temporary, file_names.MANIFEST, manifest.encode())
    filesystem.sync(temporary, [*unsynced, file_names.MANIFEST])
    lock.check()
    name = file_names.checkpoint_name(manifest.step)
    replaced = file_names.replaced_name(manifest.step, uuid.uuid4().hex)
    if name in filesystem.entries():
        # Two renames: after a crash between them, `recover` undoes the first.
        filesystem.rename(name, replaced)
        filesystem.rename(temporary, name)
        discard(filesystem, replaced)
    else:
        filesystem.rename(temporary, name)
    return name


def discard(filesystem: Filesystem, name: str) -> None:
    """Delete a checkpoint atomically: after a crash it is either complete or gone."""
    trash = name  # `delete` removes the manifest first
    if filesystem.renames_at_once:
        trash = file_names.trash_name(uuid.uuid4().hex)
        filesystem.rename(name, trash)
    step = file_names.step_of(name)
    if step is not None:
        filesystem.unlink(file_names.metrics_name(step))
    filesystem.delete(trash)


def abandon(filesystem: Filesystem, temporary: str) -> None:
    """Delete the folder of a failed save; what can't be deleted is left for `recover`."""
    with contextlib.suppress(OSError):
        filesystem.delete(temporary)


def move_aside(filesystem: Filesystem) -> bool:
    """Move all checkpoints into a folder `before-N`; False if there are none."""
    names = filesystem.entries()
    num_checkpoints = sum(file_names.step_of(name) is not None for name in names)
    if not num_checkpoints:
        return False
    aside = next(f"before-{n}" for n in range(1, len(names) + 2) if f"before-{n}" not in names)
    filesystem.make(aside)
    for name in names:
        if file_names.step_of(name) is not None or file_names.step_of_metrics(name) is not None:
            filesystem.rename(name, f"{aside}/{name}")
    logger.warning(
        "resume_mode=None: the run starts from scratch; %d checkpoints that were in %s are in %s "
        "now", num_checkpoints, filesystem, aside,
    )  # fmt: skip
    return True


def recover(filesystem: Filesystem) -> None:
    """Finish or undo interrupted saves and deletions of earlier runs. Needs the lock."""
    names = set(filesystem.entries())
    if not filesystem.renames_at_once:
        for name in [name for name in names if _is_unfinished(filesystem, name)]:
            filesystem.delete(name)
            names.remove(name)
    for name in sorted(names):
        replaced_step = file_names.step_of_replaced(name)
        metrics_step = file_names.step_of_metrics(name)
        if replaced_step is not None:
            original = file_names.checkpoint_name(replaced_step)
            if original in names:
                discard(filesystem, name)
            else:
                filesystem.rename(name, original)
                names.add(original)
        elif file_names.is_leftover(name):
            logger.info("%s/%s is left over from an interrupted run; deleted", filesystem, name)
            if filesystem.is_folder(name):
                filesystem.delete(name)
            else:
                filesystem.unlink(name)
        elif metrics_step is not None and file_names.checkpoint_name(metrics_step) not in names:
            filesystem.unlink(name)


def _is_unfinished(filesystem: Filesystem, name: str) -> bool:
    """Whether a checkpoint folder has no manifest, on a file system without atomic rename."""
    is_named = file_names.step_of(name) is not None or file_names.step_of_replaced(name) is not None
    return is_named and filesystem.size(name, file_names.MANIFEST) is None


def probe(filesystem: Filesystem) -> None:
    """Check that files can be written, synced and renamed; leaves no file.

    Raises:
        OSError: If one of these fails.
    """
    name = file_names.probe_name(uuid.uuid4().hex)
    try:
        filesystem.write("", name, b"probe")
        filesystem.sync("", [name])
        renamed = file_names.probe_name(uuid.uuid4().hex)
        filesystem.rename(name, renamed)
        name = renamed
    finally:
        with contextlib.suppress(OSError):
            filesystem.unlink(name)
