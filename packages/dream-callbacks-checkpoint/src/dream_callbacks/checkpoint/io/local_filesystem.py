"""LocalFilesystem: a checkpoint directory on a local or shared file system, and its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter
from dream_callbacks.checkpoint.io.direct_file import DirectFile
from dream_callbacks.checkpoint.io.filesystem import Filesystem, lock_content, parsed_lock

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOCK_FILE = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_IS_LOCKED = (errno.EACCES, errno.EAGAIN)
_MAX_LOCK_BYTES = 4096


class LocalFilesystem(Filesystem):
    """A checkpoint directory on a local or shared file system.

    Names are single path components below `root`; callers validate names read from files.

    Args:
        root: The directory; created by `make_root`.
    """

    renames_at_once = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def lock(self, run: str) -> DirectoryLock:
        """The lock of this directory, not acquired."""
        return DirectoryLock(self.root / file_names.LOCK, run)

    # Listing

    def entries(self, folder: str = "") -> list[str]:
        """Names in a folder; empty if it doesn't exist."""
        try:
            with os.scandir(self.root / folder) as found:
                return [entry.name for entry in found]
        except FileNotFoundError:
            return []

    def is_folder(self, name: str) -> bool:
        """Whether a folder exists and isn't a symlink."""
        try:
            return stat.S_ISDIR(os.lstat(self.root / name).st_mode)
        except FileNotFoundError:
            return False

    def size(self, folder: str, name: str) -> int | None:
        """Size of a regular file in bytes; None if it doesn't exist or isn't one."""
        try:
            found = os.lstat(self.root / folder / name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def free_bytes(self) -> float:
        """Free bytes available to this user."""
        return shutil.disk_usage(self.root).free

    # Reading

    def open(self, folder: str, name: str) -> BinaryIO:
        """Open a regular file for reading.

        Raises:
            DamagedCheckpointError: If it doesn't exist or isn't a regular file.
        """
        path = self.root / folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{name} is missing") from None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise DamagedCheckpointError(f"{name} isn't a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise DamagedCheckpointError(f"{name} isn't a regular file")
        return open(descriptor, "rb")

    @contextlib.contextmanager
    def reading(self, folder: str) -> Iterator[None]:
        """Protect a folder from deletion by other runs on this machine.

        Raises:
            DamagedCheckpointError: If it doesn't exist.
        """
        try:
            descriptor = os.open(self.root / folder, _FOLDER)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{folder} is no longer there") from None
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            yield
        finally:
            os.close(descriptor)

    def is_being_read(self, folder: str) -> bool:
        """Whether a process on this machine has called `reading` on a folder."""
        try:
            descriptor = os.open(self.root / folder, _FOLDER)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    # Writing

    def make_root(self) -> None:
        """Create the directory and its parents durably."""
        new = [path for path in (self.root, *self.root.parents) if not path.exists()]
        self.root.mkdir(parents=True, exist_ok=True)
        for path in new:
            _sync(path.parent)

    def make(self, folder: str) -> None:
        """Create a folder."""
        (self.root / folder).mkdir()

    def create(self, folder: str, name: str) -> ChecksummedWriter:
        """Open a new file for writing."""
        path = self.root / folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return ChecksummedWriter(str(path), DirectFile(os.open(path, flags, 0o666)))

    def sync(self, folder: str = "", names: Iterable[str] = ()) -> None:
        """Sync a folder and some of its files to disk."""
        paths = [self.root / folder, *(self.root / folder / name for name in names)]
        if len(paths) == 1:
            _sync(paths[0])
            return
        # Imported here, since it imports torch, which listing checkpoints doesn't need.
        from dream_trainer.world.daemon_thread import call_in_daemon_thread

        # Concurrently, so that one journal commit of the file system covers all of them.
        syncing = [call_in_daemon_thread("checkpoint-sync", _sync, path) for path in paths]
        wait(syncing)
        for synced in syncing:
            synced.result()

    def rename(self, old: str, new: str) -> None:
        """Rename a folder or file atomically and durably."""
        (self.root / old).rename(self.root / new)
        self.sync()
        folder, _, _ = new.rpartition("/")
        if folder:
            self.sync(folder)

    def replace(self, name: str, data: bytes, unique: str) -> None:
        """Write or overwrite a file of the directory atomically and durably."""
        temporary = f"{name}.{unique}.tmp"
        self.unlink(temporary)
        self.write("", temporary, data)
        self.sync("", [temporary])
        (self.root / temporary).replace(self.root / name)
        self.sync()

    def unlink(self, name: str) -> None:
        """Delete a file if it exists."""
        (self.root / name).unlink(missing_ok=True)

    def delete(self, folder: str) -> None:
        """Delete a folder recursively if it exists."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.root / folder)


class DirectoryLock:
    """A POSIX lock on a file that names its holder.

    The kernel releases it when the process ends for any reason; forked children, such as loader
    workers, don't hold it. Each holder has a higher fence than the previous one, which shows a
    holder that it lost the lock (a network file system may drop it).

    Args:
        path: Lock file.
        run: Id of this start of the script.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path.absolute()
        self.run = run
        self.fence = 0

    @property
    def is_held(self) -> bool:
        """Whether this object holds the lock."""
        held = _held.get(self.path)
        return held is not None and held.owner is self and held.pid == os.getpid()

    def is_held_elsewhere(self) -> bool:
        """Whether another object or process holds the lock."""
        if _is_held_here(self.path):
            return not self.is_held
        try:
            descriptor = os.open(self.path, _LOCK_FILE)
        except OSError:
            return False  # `acquire` says what is wrong
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _IS_LOCKED
        finally:
            os.close(descriptor)
        return False

    def acquire(self) -> None:
        """Acquire the lock; does nothing if it is held.

        Raises:
            CheckpointError: If another run holds it; names its process, host and start time.
        """
        if self.is_held:
            return
        if _is_held_here(self.path):
            raise CheckpointError(_in_use(self.path, "another trainer of this process"))
        descriptor = os.open(self.path, _LOCK_FILE | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in _IS_LOCKED:
                raise
            raise CheckpointError(_in_use(self.path, holder)) from None
        _held[self.path] = _Held(descriptor, os.getpid(), self)
        self.fence = _content(descriptor).get("fence", 0) + 1
        # Padded to a fixed size, so that no reader sees the end of a longer previous content.
        os.pwrite(descriptor, lock_content(self.run, self.fence).ljust(_MAX_LOCK_BYTES), 0)
        os.fsync(descriptor)

    def check(self) -> None:
        """Check that the lock wasn't lost.

        Raises:
            CheckpointError: If another run has taken over the directory.
        """
        found = _content(_held[self.path].descriptor) if self.is_held else {}
        if found.get("fence") != self.fence or found.get("run") != self.run:
            raise CheckpointError(
                f"another run has taken over {self.path.parent}: its lock says {found}, and this "
                f"run had fence {self.fence}; end one of the two, or give one another experiment "
                "name"
            )

    def release(self) -> None:
        """Release the lock if this object holds it."""
        if self.is_held:
            os.close(_held.pop(self.path).descriptor)


@dataclass
class _Held:
    """A lock that this process holds. POSIX locks belong to processes, not to objects."""

    descriptor: int
    pid: int
    owner: DirectoryLock


_held: dict[Path, _Held] = {}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_held_here(path: Path) -> bool:
    """Whether this process holds the lock; closing a descriptor of the file would release it."""
    held = _held.get(path)
    return held is not None and held.pid == os.getpid()


def _content(descriptor: int) -> dict[str, Any]:
    # Reads the locked descriptor: closing any other descriptor of the file releases the lock.
    return parsed_lock(os.pread(descriptor, _MAX_LOCK_BYTES, 0))


def _holder(descriptor: int) -> str:
    content = _content(descriptor)
    if "pid" not in content:
        return "another process"
    return f"process {content['pid']} on {content.get('host')} since {content.get('started')}"


def _in_use(path: Path, holder: str) -> str:
    return (
        f"{path.parent} is in use by {holder}; wait for it or end it, or give this run another "
        "experiment name"
    )
