"""FsspecFilesystem: a checkpoint directory behind a URL, such as s3://, gs:// or memory://."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, BinaryIO, cast

from dream_callbacks.checkpoint.errors import CheckpointError, DamagedCheckpointError
from dream_callbacks.checkpoint.format import file_names
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter, content_of, sums_of
from dream_callbacks.checkpoint.io.directory_lock import said_by, understood

_MARK = ".folder"
"""Stands for a folder that has no file yet: object stores know no empty ones."""


class FsspecFilesystem:
    """A checkpoint directory on whatever fsspec knows.

    A file is there whole or not at all, as object stores have it. Folders aren't renamed at once:
    their files are copied, inside of the store, and a folder counts as a checkpoint once it has a
    manifest.

    Args:
        url: Of the directory; what comes after "://" is for the library of the protocol.

    Raises:
        ImportError: If fsspec, or the library of the protocol, isn't installed.
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
        # Without its cache of listings, which wouldn't show what other ranks write.
        self._fs, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        self._root = root.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def lock(self, run: str) -> FsspecLock:
        """The lock of this directory, not yet held."""
        return FsspecLock(self, run)

    # Looking

    def entries(self, folder: str = "") -> list[str]:
        """Names in a folder; none if it isn't there."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)
        return [name for name in names if name != _MARK]

    def is_folder(self, name: str) -> bool:
        """Whether there is such a folder."""
        self._fs.invalidate_cache()
        return bool(self._fs.isdir(self._path(name)))

    def size(self, folder: str, name: str) -> int | None:
        """Bytes in a file; None if there is none."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.info(self._path(folder, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return int(found["size"]) if found["type"] == "file" else None

    def free_bytes(self) -> float:
        """Without end, as far as anyone knows."""
        return math.inf

    # Reading

    def open(self, folder: str, name: str) -> BinaryIO:
        """A file to read.

        Raises:
            DamagedCheckpointError: If it isn't there.
        """
        try:
            return cast("BinaryIO", self._fs.open(self._path(folder, name), "rb"))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise DamagedCheckpointError(f"{name} is missing") from None

    def read(self, folder: str, name: str, max_bytes: int | None = None) -> bytes:
        """All of a file.

        Raises:
            DamagedCheckpointError: If it isn't there, or is larger than `max_bytes`.
        """
        with self.open(folder, name) as file:
            return content_of(file, name, max_bytes)

    def sums(self, folder: str, name: str) -> FileSum:
        """Size and checksum of a file, read from front to back."""
        with self.open(folder, name) as file:
            return sums_of(file)

    def reading(self, folder: str) -> contextlib.AbstractContextManager[None]:
        """Nothing: a store can't know who reads. What is deleted meanwhile shows as missing."""
        return contextlib.nullcontext()

    def is_being_read(self, folder: str) -> bool:
        """False: see `reading`."""
        return False

    # Writing

    def make_root(self) -> None:
        """Make the directory, where that means something."""
        self._fs.makedirs(self._root, exist_ok=True)

    def make(self, folder: str) -> None:
        """Make a folder that isn't there yet."""
        self._fs.makedirs(self._path(folder), exist_ok=True)
        self._fs.pipe_file(self._path(folder, _MARK), b"")

    def create(self, folder: str, name: str) -> ChecksummedWriter:
        """A new file to write; it is there when it is closed."""
        path = self._path(folder, name)
        return ChecksummedWriter(f"{self.url}/{folder}/{name}", self._fs.open(path, "wb"))

    def write(self, folder: str, name: str, data: bytes) -> FileSum:
        """Write a new file."""
        with self.create(folder, name) as file:
            file.write(data)
        return file.sums

    def sync(self, folder: str = "", names: Iterable[str] = ()) -> None:
        """Nothing to wait for: a file that was closed lasts."""

    def rename(self, old: str, new: str) -> None:
        """Copy a folder or file, its manifest last, and delete the old one, its manifest first."""
        if not self.is_folder(old):
            self._fs.cp_file(self._path(old), self._path(new))
            self.unlink(old)
            return
        self.make(new)
        for name in sorted(self.entries(old), key=lambda name: name == file_names.MANIFEST):
            self._fs.cp_file(self._path(old, name), self._path(new, name))
        self.delete(old)

    def replace(self, name: str, data: bytes, unique: str) -> None:
        """Write a file in the directory, or another content of it; no half of it is ever seen."""
        self._fs.pipe_file(self._path(name), data)

    def unlink(self, name: str) -> None:
        """Delete a file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def delete(self, folder: str) -> None:
        """Delete a folder with all that is in it, if it is there; its manifest first."""
        self.unlink(f"{folder}/{file_names.MANIFEST}")
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(folder), recursive=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *(name for name in names if name)])


class FsspecLock:
    """A note of who writes here. The last one that came counts.

    A store of objects can't tell whether the process that wrote a note still lives. So a run that
    begins takes over, and one that goes on all the same is refused at its next save.

    Args:
        directory: Where.
        run: Identifies this start of the script.
    """

    def __init__(self, directory: FsspecFilesystem, run: str) -> None:
        self.directory = directory
        self.run = run
        self.fence = 0

    def acquire(self) -> None:
        """Take over."""
        found = self._content()
        if self.fence and found.get("run") == self.run:
            return
        self.fence = found.get("fence", 0) + 1
        self.directory.replace(file_names.LOCK, said_by(self.run, self.fence), self.run)

    def check(self) -> None:
        """Make sure that nobody has taken over.

        Raises:
            CheckpointError: If another run has.
        """
        found = self._content()
        if (found.get("run"), found.get("fence")) != (self.run, self.fence):
            raise CheckpointError(
                f"another run has taken over {self.directory}: its lock says {found}; end one of "
                "the two, or give one another experiment name"
            )

    def release(self) -> None:
        """Nothing to let go of."""

    def _content(self) -> dict[str, Any]:
        try:
            return understood(self.directory.read("", file_names.LOCK))
        except DamagedCheckpointError:
            return {}
