"""How a checkpoint comes into being and goes: each moment leaves a directory that can be used."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Collection

from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import Manifest
from dream_callbacks.checkpoint.io.filesystem import Directory, Lock

logger = logging.getLogger(__name__)


def begin(disk: Directory, step: int, run: str) -> str:
    """Make the folder in which a checkpoint is written, and return its name."""
    name = file_names.temporary_name(step, run)
    disk.delete(name)  # of an attempt that failed
    disk.make(name)
    return name


def publish(
    disk: Directory,
    temporary: str,
    manifest: Manifest,
    lock: Lock,
    unsynced: Collection[str],
) -> str:
    """Make a written folder a checkpoint, by giving it its name.

    Another checkpoint of the same step, of a run that went on from an earlier one, is replaced.

    Args:
        disk: Where.
        temporary: The folder.
        manifest: What is in it.
        lock: Held.
        unsynced: Files that the disk may not have yet. It has all the others.

    Returns:
        The name. The disk has it when this returns.

    Raises:
        CheckpointError: If the lock was lost.
    """
    disk.write(temporary, file_names.MANIFEST, manifest.encode())
    disk.sync(temporary, [*unsynced, file_names.MANIFEST])
    lock.check()
    name = file_names.checkpoint_name(manifest.step)
    replaced = file_names.replaced_name(manifest.step, uuid.uuid4().hex)
    if name in disk.entries():
        # Two renames: after a crash between them, `recover` gives the old one its name again.
        disk.rename(name, replaced)
        disk.rename(temporary, name)
        discard(disk, replaced)
    else:
        disk.rename(temporary, name)
    return name


def discard(disk: Directory, name: str) -> None:
    """Delete a checkpoint: it is gone at once, or still whole."""
    trash = name  # the manifest goes first
    if disk.renames_at_once:
        trash = file_names.trash_name(uuid.uuid4().hex)
        disk.rename(name, trash)
    step = file_names.step_of(name)
    if step is not None:
        disk.unlink(file_names.metrics_name(step))
    disk.delete(trash)


def abandon(disk: Directory, temporary: str) -> None:
    """Delete what a failed save has written; what can't be deleted now is left for `recover`."""
    with contextlib.suppress(OSError):
        disk.delete(temporary)


def recover(disk: Directory) -> None:
    """Finish or undo what an earlier run left unfinished. Needs the directory's lock."""
    names = set(disk.entries())
    if not disk.renames_at_once:
        for name in [name for name in names if _is_unfinished(disk, name)]:
            disk.delete(name)
            names.remove(name)
    for name in sorted(names):
        replaced_step = file_names.step_of_replaced(name)
        metrics_step = file_names.step_of_metrics(name)
        if replaced_step is not None:
            original = file_names.checkpoint_name(replaced_step)
            if original in names:
                discard(disk, name)
            else:
                disk.rename(name, original)
                names.add(original)
        elif file_names.is_leftover(name):
            logger.info("%s/%s was left by a run that ended while it wrote; deleted", disk, name)
            if disk.is_folder(name):
                disk.delete(name)
            else:
                disk.unlink(name)
        elif metrics_step is not None and file_names.checkpoint_name(metrics_step) not in names:
            disk.unlink(name)


def _is_unfinished(disk: Directory, name: str) -> bool:
    """Whether a checkpoint's folder has no manifest, where nothing but that makes it one."""
    is_named = file_names.step_of(name) is not None or file_names.step_of_replaced(name) is not None
    return is_named and disk.size(name, file_names.MANIFEST) is None


def probe(disk: Directory) -> None:
    """Make sure that files can be written, synced and renamed; leaves nothing behind.

    Raises:
        OSError: If they can't.
    """
    name = file_names.probe_name(uuid.uuid4().hex)
    try:
        disk.write("", name, b"probe")
        disk.sync("", [name])
        renamed = file_names.probe_name(uuid.uuid4().hex)
        disk.rename(name, renamed)
        name = renamed
    finally:
        with contextlib.suppress(OSError):
            disk.unlink(name)
