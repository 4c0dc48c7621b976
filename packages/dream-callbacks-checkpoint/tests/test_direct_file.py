"""A file whose full blocks bypass the page cache on a disk, written by a thread."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mounts import have_mounts_of_its_own, skip_unless_mountable
from new_files import BLOCK, fill, is_let_go, is_on_disk, new, opened, size_limit

from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter
from dream_callbacks.checkpoint.io.direct_file import DirectFile
from dream_trainer.testing import run_on_ranks


def test_a_large_file_bypasses_the_page_cache_where_a_disk_is_below(folder: Path) -> None:
    descriptor = opened(folder / "x")
    with ChecksummedWriter("x", DirectFile(descriptor)) as file:
        file.write(bytes(BLOCK - 1))
        assert not is_direct(descriptor)
        file.write(bytes(BLOCK + 1))  # returns when the first block is written
        assert is_direct(descriptor) is is_on_disk(folder)


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("num_blocks", [0, 3])
def test_a_thread_makes_the_direct_writes_and_is_gone_when_the_file_is_closed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_blocks: int
) -> None:
    names, pwrite, before = [], os.pwrite, threading.enumerate()

    def told(*args: Any) -> int:
        names.append(threading.current_thread().name)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", told)
    with new(folder / "x") as file:
        file.write(bytes(num_blocks * BLOCK + 1))
        while_open = set(threading.enumerate()) - set(before)

    main = threading.main_thread().name
    in_thread = is_on_disk(folder) and num_blocks > 0
    assert names == ["checkpoint-write" if in_thread else main] * num_blocks + [main]
    assert [thread.daemon for thread in while_open] == [True] * in_thread
    wait_until(lambda: threading.enumerate() == before)


def test_the_next_block_is_filled_while_one_is_written(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, pwrite = threading.Event(), os.pwrite

    def held(*args: Any) -> int:
        assert hold.wait(timeout=30)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", held)
    data = random.Random(0).randbytes(4 * BLOCK)
    with new(disk / "x") as file:
        file.write(memoryview(data)[: 2 * BLOCK - 1])  # doesn't wait for the first block
        hold.set()
        file.write(memoryview(data)[2 * BLOCK - 1 :])

    assert (disk / "x").read_bytes() == data
    assert file.sums == FileSum(len(data), zlib.crc32(data))


def test_closing_waits_for_the_write_in_flight(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite

    def slow(*args: Any) -> int:
        time.sleep(0.3)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    descriptor = opened(disk / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    file.write(bytes(BLOCK))
    assert (disk / "x").stat().st_size == 0
    file.close()

    assert (disk / "x").stat().st_size == BLOCK
    assert is_let_go(descriptor)


def test_a_write_that_hangs_does_not_keep_python_from_exiting(disk: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from dream_callbacks.checkpoint.io.direct_file import BLOCK_BYTES, DirectFile\n"
        "os.pwrite = lambda *_: time.sleep(3600)\n"
        "file = DirectFile(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT))\n"
        "file.write(memoryview(bytes(BLOCK_BYTES)))\n"
        "print('in flight')\n"
    )
    command = [sys.executable, "-c", script, str(disk / "x")]
    ended = subprocess.run(command, capture_output=True, timeout=30, check=True, text=True)

    assert ended.stdout == "in flight\n"


# Errors


def test_no_block_is_written_after_one_that_failed(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets, pwrite = [], os.pwrite

    def fails_once(descriptor: int, data: memoryview, offset: int) -> int:
        offsets.append(offset)
        if offset == BLOCK:
            raise OSError(errno.EIO, "Input/output error")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", fails_once)
    sink = DirectFile(opened(disk / "x"))
    blocks = [memoryview(mmap.mmap(-1, BLOCK)) for _ in range(3)]  # aligned
    rest = memoryview(b"1")
    for call in (
        lambda: write_all(sink, blocks),
        lambda: sink.write(blocks[0]),
        lambda: sink.write(rest),
        sink.close,
    ):
        with pytest.raises(OSError, match="Input/output error"):
            call()

    assert offsets == [0, BLOCK]


def write_all(sink: DirectFile, blocks: list[memoryview]) -> None:
    for block in blocks:
        sink.write(block)


@pytest.mark.parametrize("num_more", [0, 1], ids=["no_rest", "a_rest"])
def test_an_error_of_the_last_full_block_is_raised_when_the_file_is_closed(
    disk: Path, monkeypatch: pytest.MonkeyPatch, num_more: int
) -> None:
    pwrite, closing = os.pwrite, threading.Event()

    def late(descriptor: int, data: memoryview, offset: int) -> int:
        assert offset == 0 or closing.wait(timeout=30)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", late)
    descriptor = opened(disk / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    with size_limit(BLOCK):
        file.write(bytes(2 * BLOCK + num_more))
        closing.set()
        with pytest.raises(OSError, match="File too large: 'x'") as first:
            file.close()

    assert file.first_error is first.value
    assert is_let_go(descriptor)


# Ctrl-C


@pytest.mark.parametrize("num_before", [0, 1, 2])
def test_ctrl_c_reaches_the_caller_of_torch_save_when_the_write_in_flight_is_done(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_before: int
) -> None:
    descriptor = opened(folder / "x")
    sink = Watched(descriptor)
    sizes: list[int] = []
    pwrite = os.pwrite

    def interrupted(descriptor: int, data: memoryview, offset: int) -> int:
        if offset == num_before * BLOCK:
            if is_on_disk(folder):
                wait_until(lambda: sink.num_writes == num_before + 2)
            interrupt_main_thread()
            time.sleep(0.3)
        sizes.append(pwrite(descriptor, data, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "pwrite", interrupted)
    file = ChecksummedWriter("x", sink)
    with pytest.raises(KeyboardInterrupt), file:
        torch.save(torch.zeros(3 * BLOCK, dtype=torch.uint8), file)  # type: ignore[arg-type]  # torch asks for less

    assert isinstance(file.first_error, KeyboardInterrupt)
    if is_on_disk(folder):
        assert sizes[: num_before + 1] == [BLOCK] * (num_before + 1)
    else:
        assert sizes == [BLOCK] * num_before
    assert is_let_go(descriptor)


def test_ctrl_c_while_a_file_is_closed_waits_for_the_write_in_flight(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite

    def interrupting(*args: Any) -> int:
        wait_until(lambda: sink.is_closing)
        interrupt_main_thread()
        time.sleep(0.3)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", interrupting)
    descriptor = opened(disk / "x")
    sink = Watched(descriptor)
    with pytest.raises(KeyboardInterrupt):
        write_a_block_and_close(sink)

    assert (disk / "x").stat().st_size == BLOCK
    assert is_let_go(descriptor)


def test_a_second_ctrl_c_leaves_a_write_that_hangs_and_its_descriptor(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, release = os.pwrite, threading.Event()

    def hanging(*args: Any) -> int:
        wait_until(lambda: sink.is_closing)
        for _ in range(2):
            interrupt_main_thread()
            time.sleep(0.3)
        assert release.wait(timeout=30)
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", hanging)
    descriptor = opened(disk / "x")
    sink = Watched(descriptor)
    with pytest.raises(KeyboardInterrupt):
        write_a_block_and_close(sink)
    other = opened(disk / "other")
    assert not is_let_go(descriptor)
    release.set()
    wait_until(lambda: not writer_threads())

    assert os.fstat(other).st_size == 0
    assert os.fstat(descriptor).st_size == BLOCK
    os.close(other)
    os.close(descriptor)


@pytest.mark.parametrize("is_running", [True, False], ids=["after_the_start", "before_it"])
def test_ctrl_c_while_the_thread_starts_leaves_no_thread(
    disk: Path, monkeypatch: pytest.MonkeyPatch, is_running: bool
) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if is_running:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    descriptor = opened(disk / "x")
    with pytest.raises(KeyboardInterrupt), ChecksummedWriter("x", DirectFile(descriptor)) as file:
        file.write(bytes(3 * BLOCK))

    wait_until(lambda: not writer_threads())
    assert is_let_go(descriptor)
    assert (disk / "x").stat().st_size == 0


class Watched(DirectFile):
    """A file that says how far its caller, the main thread, is."""

    num_writes = 0
    is_closing = False

    def write(self, data: memoryview, /) -> None:
        self.num_writes += 1
        super().write(data)

    def close(self) -> None:
        self.is_closing = True
        super().close()


def write_a_block_and_close(sink: DirectFile) -> None:
    file = ChecksummedWriter("x", sink)
    file.write(bytes(BLOCK))
    file.close()


def interrupt_main_thread() -> None:
    """Raise KeyboardInterrupt in the main thread, also while it waits."""
    time.sleep(0.1)
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def wait_until(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def writer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint-write"]


# File systems that accept O_DIRECT and refuse what is written with it


def test_a_file_is_whole_where_direct_writes_are_refused(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    with new(disk / "x") as file:
        file.write(data)

    assert refused == [(errno.EINVAL, True)]
    assert (disk / "x").read_bytes() == data
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
