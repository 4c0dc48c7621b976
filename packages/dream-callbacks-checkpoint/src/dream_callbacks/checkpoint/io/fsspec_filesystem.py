"""FsspecFilesystem: a checkpoint directory at a URL, such as s3://, gs:// or memory://."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter
from dream_callbacks.checkpoint.io.filesystem import Filesystem, lock_content, parsed_lock

_MARK = ".folder"
"""Marks an empty folder, which object stores don't have."""


class FsspecFilesystem(Filesystem):
    """A checkpoint directory on any file system supported by fsspec.

    Files appear atomically, as in object stores. Renaming a folder copies its files within the
    store; a folder is a checkpoint once it has a manifest.

    Args:
        url: URL of the directory.

    Raises:
        ImportError: If fsspec or the library of the URL's protocol isn't installed.
    """

    renames_at_once = False

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ModuleNotFoundError as error:
            if error.name != "fsspec":
                raise
            raise ImportError(
                f"{url} needs fsspec: pip install 'dream-callbacks-checkpoint[fsspec]'"
            ) from None
        self.url = url.rstrip("/")
        # No listings cache: it would hide files that other ranks write.
        self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def lock(self, run: str) -> FsspecLock:
        """The lock of this directory, not acquired."""
        return FsspecLock(self, run)

    # Listing

    def entries(self, folder: str = "") -> list[str]:
        """Names in a folder; empty if it doesn't exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)
        return [name for name in names if name != _MARK]

    def is_folder(self, name: str) -> bool:
        """Whether a folder exists."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._path(name)))

    def size(self, folder: str, name: str) -> int | None:
        """Size of a file in bytes; None if it doesn't exist."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.info(self._path(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def free_bytes(self) -> float:
        """Infinite: object stores report no limit."""
        return math.inf

    # Reading

    def open(self, folder: str, name: str) -> BinaryIO:
        """Open a file for reading.

        Raises:
            DamagedCheckpointError: If it doesn't exist.
        """
        try:
            return cast("BinaryIO", self._fs.open(self._path(folder, name), "rb"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedCheckpointError(f"{name} is missing") from None

    def reading(self, folder: str) -> contextlib.AbstractContextManager[None]:
        """Does nothing: a store doesn't track readers. Files deleted while reading are missing."""
        return contextlib.nullcontext()

    def is_being_read(self, folder: str) -> bool:
        """Always False; see `reading`."""
        return False

    # Writing

    def make_root(self) -> None:
        """Create the directory, on file systems that have directories."""
        self._fs.makedirs(self._root, exist_ok=True)

    def make(self, folder: str) -> None:
        """Create a folder."""
        self._fs.makedirs(self._path(folder), exist_ok=True)
        self._fs.pipe_file(self._path(folder, _MARK), b"")

    def create(self, folder: str, name: str) -> ChecksummedWriter:
        """Open a new file for writing; it appears when it is closed."""
        path = self._path(folder, name)
        return ChecksummedWriter(f"{self.url}/{folder}/{name}", self._fs.open(path, "wb"))

    def sync(self, folder: str = "", names: Iterable[str] = ()) -> None:
        """Does nothing: a closed file is durable."""

    def rename(self, old: str, new: str) -> None:
        """Copy a file or folder, manifest last, and delete the original, manifest first."""
        if not self.is_folder(old):
            self._fs.cp_file(self._path(old), self._path(new))
            self.unlink(old)
            return
        self.make(new)
        for name in sorted(self.entries(old), key=lambda name: name == file_names.MANIFEST):
            self._fs.cp_file(self._path(old, name), self._path(new, name))
        self.delete(old)

    def replace(self, name: str, data: bytes, unique: str) -> None:
        """Write or overwrite a file of the directory atomically."""
        self._fs.pipe_file(self._path(name), data)

    def unlink(self, name: str) -> None:
        """Delete a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def delete(self, folder: str) -> None:
        """Delete a folder recursively if it exists, manifest first."""
        self.unlink(f"{folder}/{file_names.MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(folder), recursive=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *(name for name in names if name)])


class FsspecLock:
    """A file that names the writing run; the last one to acquire it holds it.

    An object store can't tell whether the process that wrote the file is alive. So a new run takes
    over, and the next save of the old one fails.

    Args:
        directory: The checkpoint directory.
        run: Id of this start of the script.
    """

    def __init__(self, directory: FsspecFilesystem, run: str) -> None:
        self.directory = directory
        self.run = run
        self.fence = 0

    def is_held_elsewhere(self) -> bool:
        """False: whether the last holder still runs isn't known."""
        return False

    def acquire(self) -> None:
        """Take over the directory."""
        found = self._content()
        if self.fence and found.get("run") == self.run:
            return
        self.fence = found.get("fence", 0) + 1
        self.directory.replace(file_names.LOCK, lock_content(self.run, self.fence), self.run)

    def check(self) -> None:
        """Check that no other run has taken over.

        Raises:
            CheckpointError: If one has.
        """
        found = self._content()
        if (found.get("run"), found.get("fence")) != (self.run, self.fence):
            raise CheckpointError(
                f"another run has taken over {self.directory}: its lock says {found}; end one of "
                "the two, or give one another experiment name"
            )

    def release(self) -> None:
        """Does nothing."""

    def _content(self) -> dict[str, Any]:
        try:
            return parsed_lock(self.directory.read("", file_names.LOCK))
        except DamagedCheckpointError:
            return {}
