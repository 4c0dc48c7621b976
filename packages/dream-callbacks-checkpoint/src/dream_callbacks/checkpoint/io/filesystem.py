"""Filesystem and Lock: the interface of a checkpoint directory, local or at a URL."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter, content_of, sums_of

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


class Lock(Protocol):
    """Lock of a checkpoint directory; each holder has a higher fence than the previous one."""

    fence: int

    def is_held_elsewhere(self) -> bool: ...

    def acquire(self) -> None: ...

    def check(self) -> None: ...

    def release(self) -> None: ...


class Filesystem(Protocol):
    """A checkpoint directory: files and folders of files.

    `LocalFilesystem` and `FsspecFilesystem`, which derive from it, document the other methods.

    Attributes:
        renames_at_once: Whether folders are renamed atomically. If not, files are copied one by
            one; the copy is complete once the manifest, copied last, exists.
    """

    renames_at_once: bool

    def lock(self, run: str) -> Lock: ...

    def entries(self, folder: str = "") -> list[str]: ...

    def is_folder(self, name: str) -> bool: ...

    def size(self, folder: str, name: str) -> int | None: ...

    def free_bytes(self) -> float: ...

    def open(self, folder: str, name: str) -> BinaryIO: ...

    def read(self, folder: str, name: str, max_bytes: int | None = None) -> bytes:
        """Read a file.

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

    def reading(self, folder: str) -> AbstractContextManager[None]: ...

    def is_being_read(self, folder: str) -> bool: ...

    def make_root(self) -> None: ...

    def make(self, folder: str) -> None: ...

    def create(self, folder: str, name: str) -> ChecksummedWriter: ...

    def write(self, folder: str, name: str, data: bytes) -> FileSum:
        """Write a new file."""
        with self.create(folder, name) as file:
            file.write(data)
        return file.sums

    def sync(self, folder: str = "", names: Iterable[str] = ()) -> None: ...

    def rename(self, old: str, new: str) -> None: ...

    def replace(self, name: str, data: bytes, unique: str) -> None: ...

    def unlink(self, name: str) -> None: ...

    def delete(self, folder: str) -> None: ...


def is_url(path: str | Path) -> bool:
    """Whether a path is a URL, which pathlib would turn into a folder named "s3:"."""
    return _URL.match(str(path)) is not None


def below(path: str | Path, *names: str) -> str | Path:
    """Append names to a path or URL."""
    return "/".join([str(path).rstrip("/"), *names]) if is_url(path) else Path(path, *names)


def lock_content(run: str, fence: int) -> bytes:
    """Content of a lock file held by this process."""
    content = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "run": run,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "fence": fence,
    }
    return json.dumps(content).encode()


def parsed_lock(data: bytes) -> dict[str, Any]:
    """Parse the content of a lock file; empty if it is malformed."""
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    is_valid = isinstance(content, dict) and isinstance(content.get("fence", 0), int)
    return content if is_valid else {}
