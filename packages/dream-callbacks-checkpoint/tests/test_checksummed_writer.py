"""A file that is written in blocks and that knows its checksum."""

from __future__ import annotations

import io
import os
import random
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from new_files import BLOCK, MIB, fill, is_let_go, new, opened, size_limit

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.checksummed_writer import ChecksummedWriter, content_of, sums_of
from dream_callbacks.checkpoint.io.direct_file import DirectFile


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


# Errors


@pytest.mark.parametrize("limit", [BLOCK // 2, 3 * BLOCK, 3 * BLOCK + 512])
def test_an_error_of_the_file_system_is_raised_and_the_file_closed(
    folder: Path, limit: int
) -> None:
    descriptor = opened(folder / "x")

    with size_limit(limit), pytest.raises(OSError, match="File too large: 'x'"):
        fill(descriptor, 20 if limit > BLOCK else 3)

    assert is_let_go(descriptor)


def test_an_error_of_the_second_block_is_raised_by_all_that_follows(folder: Path) -> None:
    descriptor = opened(folder / "x")
    file = ChecksummedWriter("x", DirectFile(descriptor))
    with size_limit(BLOCK), pytest.raises(OSError, match="File too large: 'x'") as first:
        file.write(bytes(3 * BLOCK))  # the second block is awaited when the third one is there
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


def test_ctrl_c_is_raised_though_closing_fails_too() -> None:
    class Interrupted(io.BytesIO):
        def write(self, data: Any) -> int:
            raise KeyboardInterrupt

        def close(self) -> None:
            super().close()
            raise OSError(5, "Input/output error")

    file = ChecksummedWriter("x", Interrupted())
    file.write(bytes(10))
    with pytest.raises(KeyboardInterrupt):
        file.close()

    assert file.closed


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


# Reading


def test_no_more_is_read_than_was_asked_for() -> None:
    assert content_of(io.BytesIO(b"abc"), "x", 3) == b"abc"
    with pytest.raises(DamagedCheckpointError, match="x has more than 2 bytes"):
        content_of(io.BytesIO(b"abc"), "x", 2)
