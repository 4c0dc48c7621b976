"""New files: where they are, how large they may get, whether they are closed."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter
from dream_callbacks.checkpoint.io.direct_file import DirectFile

MIB = 1 << 20
BLOCK = 4 * MIB


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def new(path: Path) -> ChecksummedWriter:
    return ChecksummedWriter("x", DirectFile(opened(path)))


def is_on_disk(folder: Path) -> bool:
    return os.major(folder.stat().st_dev) != 0


def fill(descriptor: int, num_pieces: int) -> None:
    with ChecksummedWriter("x", DirectFile(descriptor)) as file:
        for _ in range(num_pieces):
            file.write(bytes(MIB + 1))


@contextlib.contextmanager
def size_limit(num_bytes: int) -> Iterator[None]:
    """While this lasts, the system refuses to make files larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def is_let_go(descriptor: int) -> bool:
    """Whether the descriptor is closed."""
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error.errno == errno.EBADF
    return False
