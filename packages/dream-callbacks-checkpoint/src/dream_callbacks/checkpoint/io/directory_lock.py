"""DirectoryLock: only one run at a time writes to a checkpoint directory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dream_callbacks.checkpoint.errors import CheckpointError

_MAX_BYTES = 4096


@dataclass
class _Held:
    """A lock that this process holds. POSIX locks belong to processes, not to objects."""

    descriptor: int
    pid: int
    owner: DirectoryLock


_held: dict[Path, _Held] = {}


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

    def acquire(self) -> None:
        """Acquire the lock; does nothing if it is held.

        Raises:
            CheckpointError: If another run holds it; names its process, host and start time.
        """
        if self.is_held:
            return
        held = _held.get(self.path)
        if held is not None and held.pid == os.getpid():
            raise CheckpointError(_in_use(self.path, "another trainer of this process"))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.path, flags, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise CheckpointError(_in_use(self.path, holder)) from None
        _held[self.path] = _Held(descriptor, os.getpid(), self)
        self.fence = _content(descriptor).get("fence", 0) + 1
        # Padded to a fixed size, so that no reader sees the end of a longer previous content.
        os.pwrite(descriptor, lock_content(self.run, self.fence).ljust(_MAX_BYTES), 0)
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
    is_whole = isinstance(content, dict) and isinstance(content.get("fence", 0), int)
    return content if is_whole else {}


def _content(descriptor: int) -> dict[str, Any]:
    # Reads the locked descriptor: closing any other descriptor of the file releases the lock.
    return parsed_lock(os.pread(descriptor, _MAX_BYTES, 0))


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
