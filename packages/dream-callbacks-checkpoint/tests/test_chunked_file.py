"""A file that is written in chunks, past the page cache where there is a disk below it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dream_callbacks.checkpoint.chunked_file import ChunkedFile

MIB = 1 << 20
CHUNK = 4 * MIB


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a block device, and one on a file system without."""
    if request.param == "disk":
        if os.major(tmp_path.stat().st_dev) == 0:
            pytest.skip("the temporary folder isn't on a block device")
        yield tmp_path
        return
    if not Path("/dev/shm").is_dir() or os.major(Path("/dev/shm").stat().st_dev) != 0:
        pytest.skip("needs a tmpfs at /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def new(path: Path) -> ChunkedFile:
    return ChunkedFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK + 4097])
def test_what_was_written_is_there(folder: Path, size: int) -> None:
    draw = random.Random(size)
    data = draw.randbytes(size)
    begin = 0

    with new(folder / "x") as file:
        while begin < size:
            end = min(begin + draw.choice([1, 30, 4096, MIB, 5 * MIB]), size)
            assert file.write(memoryview(data)[begin:end]) == end - begin
            begin = end

    assert (folder / "x").read_bytes() == data
    assert file.closed
    file.close()


def test_a_large_file_bypasses_the_page_cache_where_a_disk_is_below(folder: Path) -> None:
    descriptor = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)
    with ChunkedFile(descriptor) as file:
        file.write(bytes(CHUNK - 1))
        assert not is_direct(descriptor)
        file.write(bytes(2))
        assert is_direct(descriptor) is (folder.parts[1] != "dev")


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("limit", [CHUNK // 2, 3 * CHUNK, 3 * CHUNK + 512])
def test_an_error_of_the_file_system_is_raised_and_the_file_closed(
    folder: Path, limit: int
) -> None:
    descriptor = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)

    with size_limit(limit), pytest.raises(OSError, match="File too large"):
        fill(ChunkedFile(descriptor), 20 if limit > CHUNK else 3)

    assert is_let_go(descriptor)


def test_an_error_of_one_chunk_is_raised_though_later_ones_are_written(folder: Path) -> None:
    descriptor = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)
    file = ChunkedFile(descriptor)
    with size_limit(CHUNK):
        file.write(bytes(2 * CHUNK))
        wait_for_writing()
    with pytest.raises(OSError, match="File too large"):
        fill(file, 3 * CHUNK // MIB)

    assert is_let_go(descriptor)


def test_an_error_that_comes_late_is_raised_when_the_file_is_closed(folder: Path) -> None:
    descriptor = os.open(folder / "x", os.O_WRONLY | os.O_CREAT)
    file = ChunkedFile(descriptor)
    with size_limit(CHUNK):
        file.write(bytes(CHUNK + 10))
        with pytest.raises(OSError, match="File too large"):
            file.close()

    assert is_let_go(descriptor)


def test_a_closed_file_refuses_what_would_go_to_another(tmp_path: Path) -> None:
    file = new(tmp_path / "x")
    file.close()
    other = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)

    with pytest.raises(ValueError, match="closed file"):
        file.write(bytes(2 * CHUNK))

    assert os.fstat(other).st_size == 0
    os.close(other)


def fill(file: ChunkedFile, num_pieces: int) -> None:
    with file:
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


def wait_for_writing() -> None:
    while any(thread.name == "checkpoint-file" for thread in threading.enumerate()):
        time.sleep(0.01)


def is_let_go(descriptor: int) -> bool:
    """Whether nothing writes any more, and the descriptor is closed."""
    writing = [thread for thread in threading.enumerate() if thread.name == "checkpoint-file"]
    try:
        os.fstat(descriptor)
    except OSError as error:
        return error.errno == errno.EBADF and not writing
    return False
