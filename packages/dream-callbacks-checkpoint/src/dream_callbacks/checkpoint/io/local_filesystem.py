"""LocalFilesystem: durable operations of a checkpoint directory on a local file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import BinaryIO

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter, content_of, sums_of
from dream_callbacks.checkpoint.io.direct_file import DirectFile
from dream_callbacks.checkpoint.io.directory_lock import DirectoryLock

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class LocalFilesystem:
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

    def read(self, folder: str, name: str, max_bytes: int | None = None) -> bytes:
        """Read a whole file.

        Raises:
            DamagedCheckpointError: If it doesn't exist, isn't a regular file, or is larger than
                `max_bytes`.
        """
        with self.open(folder, name) as file:
            return content_of(file, name, max_bytes)

    def sums(self, folder: str, name: str) -> FileSum:
        """Read a file to compute its size and checksum."""
        with self.open(folder, name) as file:
            return sums_of(file)

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

    def write(self, folder: str, name: str, data: bytes) -> FileSum:
        """Write a new file."""
        with self.create(folder, name) as file:
            file.write(data)
        return file.sums

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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
