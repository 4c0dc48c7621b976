"""A file that is written in blocks, past the page cache on a disk, and that knows its checksum."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import random
import resource
import signal
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mounts import have_mounts_of_its_own, skip_unless_mountable

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import (
    ChecksummedWriter,
    DirectFile,
    content_of,
    sums_of,
)
from dream_trainer.testing import run_on_ranks

MIB = 1 << 20
BLOCK = 4 * MIB


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


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def new(path: Path) -> ChecksummedWriter:
    return ChecksummedWriter("x", DirectFile(opened(path)))


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 4097])
def test_what_was_written_is_there_with_its_sums(folder: Path, size: int) -> None:
    draw = random.Random(size)
    data = draw.randbytes(size)
    begin = 0

    with new(folder / "x") as file:
        while begin < size:
            end = min(begin + draw.choice([1, 30, 4096, MIB, 5 * MIB]), size)
            assert file.write(memoryview(data)[begin:end]) == end - begin
            begin = end
            assert file.tell() == end

    assert (folder / "x").read_bytes() == data
    assert file.sums == FileSum(size, zlib.crc32(data))
    with (folder / "x").open("rb") as found:
        assert sums_of(found) == file.sums
    assert file.closed
    file.close()


def test_sums_are_those_of_all_that_was_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    pieces = [draw.randbytes(n) for n in (3, MIB, 0, 5 * MIB + 1, 10, 2 * MIB)]
    path = tmp_path / "x"

    with ChecksummedWriter("x", path.open("wb")) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)

    data = b"".join(pieces)
    assert path.read_bytes() == data
    assert file.sums == FileSum(len(data), zlib.crc32(data))
    with path.open("rb") as found:
        assert sums_of(found) == file.sums


def test_a_tensor_is_written_as_its_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(BLOCK // 4 + 3, dtype=torch.int32).reshape(1, -1)
    with new(tmp_path / "x") as file:
        assert file.write(tensor.numpy()) == tensor.nbytes

    assert (tmp_path / "x").read_bytes() == tensor.numpy().tobytes()


def test_a_large_file_bypasses_the_page_cache_where_a_disk_is_below(folder: Path) -> None:
    descriptor = opened(folder / "x")
    with ChecksummedWriter("x", DirectFile(descriptor)) as file:
        file.write(bytes(BLOCK - 1))
        assert not is_direct(descriptor)
        file.write(bytes(2))
        assert is_direct(descriptor) is (folder.parts[1] != "dev")


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def test_small_pieces_are_written_together() -> None:
    sizes = []

    class Sizes(io.BytesIO):
        def write(self, data: Any) -> int:
            sizes.append(len(data))
            return super().write(data)

    with ChecksummedWriter("x", Sizes()) as file:
        for size in (*[40] * 1000, MIB, *[MIB // 2] * 3, 2 * BLOCK, 5):
            file.write(bytes(size))
            file.flush()

    assert sizes == [BLOCK, BLOCK, 2 * MIB + MIB // 2 + 40_005]
    assert file.tell() == file.sums.num_bytes == sum(sizes)


def test_the_calling_thread_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, pwrite = [], os.pwrite

    def told(*args: Any) -> int:
        threads.append(threading.get_ident())
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", told)
    with new(tmp_path / "x") as file:
        file.write(bytes(3 * BLOCK + 1))

    assert threads == [threading.get_ident()] * 4


# Errors


@pytest.mark.parametrize("limit", [BLOCK // 2, 3 * BLOCK, 3 * BLOCK + 512])
def test_an_error_of_the_file_system_is_raised_and_the_file_closed(
    folder: Path, limit: int
) -> None:
    descriptor = opened(folder / "x")

    with size_limit(limit), pytest.raises(OSError, match="File too large: 'x'"):
        fill(descriptor, 20 if limit > BLOCK else 3)

    assert is_let_go(descriptor)


def test_an_error_of_one_block_is_raised_though_later_ones_could_be_written(folder: Path) -> None:
    descriptor = opened(folder / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    with size_limit(BLOCK), pytest.raises(OSError, match="File too large") as first:
        file.write(bytes(2 * BLOCK))
    for call in (lambda: file.write(b"1"), lambda: file.write(bytes(3 * BLOCK)), file.close):
        with pytest.raises(OSError, match="File too large") as again:
            call()
        assert again.value is first.value

    assert is_let_go(descriptor)
    assert (folder / "x").stat().st_size == BLOCK


def test_an_error_that_comes_late_is_raised_when_the_file_is_closed(folder: Path) -> None:
    descriptor = opened(folder / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    with size_limit(BLOCK):
        file.write(bytes(BLOCK + 10))
        with pytest.raises(OSError, match="File too large"):
            file.close()

    assert is_let_go(descriptor)


def test_after_an_error_nothing_more_is_written_and_closing_raises_it() -> None:
    class FailsOnce(io.BytesIO):
        def write(self, data: Any) -> int:
            if not written:
                written.append(data)
                raise OSError(28, "No space left on device")
            return super().write(data)

    written: list[Any] = []
    content = FailsOnce()
    file = ChecksummedWriter("x", content)
    file.write(bytes(10))
    with pytest.raises(OSError, match=r"No space left on device: 'x'") as first:
        file.write(bytes(BLOCK))
    for call in (lambda: file.write(bytes(2 * MIB)), file.close):
        with pytest.raises(OSError, match="No space left on device") as again:
            call()
        assert again.value is first.value

    assert file.first_error is first.value
    assert content.closed
    file.close()


def test_an_error_of_closing_is_raised_and_kept() -> None:
    class FailsToClose(io.BytesIO):
        def close(self) -> None:
            super().close()
            raise OSError(5, "Input/output error")

    file = ChecksummedWriter("x", FailsToClose())
    file.write(bytes(10))
    with pytest.raises(OSError, match="Input/output error: 'x'") as first:
        file.close()

    assert file.first_error is first.value
    assert file.closed


def test_a_closed_file_refuses_what_would_go_to_another(tmp_path: Path) -> None:
    sink = DirectFile(opened(tmp_path / "x"))
    file = ChecksummedWriter("x", sink)
    file.close()
    other = opened(tmp_path / "other")

    for data in (b"1", bytes(2 * BLOCK)):
        with pytest.raises(ValueError, match="closed file"):
            file.write(data)
    for call in (lambda: sink.write(memoryview(b"1")), sink.close):
        with pytest.raises(OSError, match="Bad file descriptor"):
            call()

    assert os.fstat(other).st_size == 0
    os.close(other)


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_an_interrupted_write_reaches_the_caller_of_torch_save_and_closes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_before: int
) -> None:
    descriptor = opened(tmp_path / "x")
    calls = []
    pwrite = os.pwrite

    def interrupted(*args: Any) -> int:
        calls.append(args)
        if len(calls) == num_before + 1:
            signal.raise_signal(signal.SIGINT)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", interrupted)
    file = ChecksummedWriter("x", DirectFile(descriptor))
    with pytest.raises(KeyboardInterrupt), file:
        torch.save(torch.zeros(3 * BLOCK, dtype=torch.uint8), file)  # type: ignore[arg-type]  # torch asks for less

    assert isinstance(file.first_error, KeyboardInterrupt)
    assert len(calls) == num_before + 1
    assert is_let_go(descriptor)


def test_a_file_that_is_interrupted_while_it_is_closed_isnt_closed_as_if_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = opened(tmp_path / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    file.write(bytes(10))
    monkeypatch.setattr(os, "pwrite", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        file.close()

    assert is_let_go(descriptor)


def test_an_error_of_the_caller_is_raised_though_closing_fails_too() -> None:
    class FailsToClose(io.BytesIO):
        def close(self) -> None:
            super().close()
            raise OSError(5, "Input/output error")

    with pytest.raises(KeyError, match="the caller"), ChecksummedWriter("x", FailsToClose()):
        raise KeyError("the caller")


@pytest.mark.parametrize("num_bytes", [0, 100, BLOCK, 3 * BLOCK - 1, 3 * BLOCK + 100])
def test_torch_save_to_a_full_disk_raises_what_the_disk_said(folder: Path, num_bytes: int) -> None:
    descriptor = opened(folder / "x")
    with size_limit(num_bytes), pytest.raises(OSError, match="File too large: 'x'"):
        save_tensors(descriptor, 3)

    assert is_let_go(descriptor)


def save_tensors(descriptor: int, num_tensors: int) -> None:
    with ChecksummedWriter("x", DirectFile(descriptor)) as file:
        for _ in range(num_tensors):
            torch.save(torch.zeros(BLOCK, dtype=torch.uint8), file)  # type: ignore[arg-type]  # torch asks for less


# File systems that accept O_DIRECT and refuse what is written with it


def test_a_file_is_whole_where_direct_writes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.major(tmp_path.stat().st_dev) == 0:
        pytest.skip("the temporary folder isn't on a block device")
    refused, pwrite = [], os.pwrite

    def misaligned(descriptor: int, data: memoryview, offset: int) -> int:
        """Write from an odd address, which a disk refuses with O_DIRECT, and only then."""
        copy = memoryview(mmap.mmap(-1, len(data) + 1))[1:]
        copy[:] = data
        try:
            return pwrite(descriptor, copy, offset)
        except OSError as error:
            refused.append((error.errno, is_direct(descriptor)))
            raise

    monkeypatch.setattr(os, "pwrite", misaligned)
    data = random.Random(0).randbytes(3 * BLOCK + 5)
    with new(tmp_path / "x") as file:
        file.write(data)

    assert refused == [(errno.EINVAL, True)]
    assert (tmp_path / "x").read_bytes() == data
    assert file.sums == FileSum(len(data), zlib.crc32(data))


def test_a_short_write_to_a_disk_of_large_sectors_is_reported_as_what_it_is(tmp_path: Path) -> None:
    skip_unless_mountable(tmp_path, "ext4")
    (found,) = run_on_ranks(error_on_large_sectors, 1, tmp_path)

    # After a write that was cut short within a sector, O_DIRECT alone would say EINVAL.
    assert found == (errno.EFBIG, 3 * BLOCK + 512)


def error_on_large_sectors(root: Path) -> tuple[int | None, int]:
    have_mounts_of_its_own()
    image, disk = root / "disk.img", root / "disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(64 << 20)
    command = ["losetup", "--find", "--show", "--sector-size", "4096", str(image)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, str(disk)], check=True)
        try:
            with size_limit(3 * BLOCK + 512), pytest.raises(OSError) as caught:  # noqa: PT011  # returned
                fill(opened(disk / "x"), 20)
            return caught.value.errno, (disk / "x").stat().st_size
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


# Reading


def test_no_more_is_read_than_was_asked_for() -> None:
    assert content_of(io.BytesIO(b"abc"), "x", 3) == b"abc"
    with pytest.raises(DamagedCheckpointError, match="x has more than 2 bytes"):
        content_of(io.BytesIO(b"abc"), "x", 2)


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
