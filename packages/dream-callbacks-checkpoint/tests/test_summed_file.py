"""A file that knows its sums when it is written, and the first error of its file system."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path
from typing import BinaryIO

import pytest

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.manifest import FileSum
from dream_callbacks.checkpoint.summed_file import SummedFile, content_of, sums_of

MIB = 1 << 20


def test_sums_are_those_of_all_that_was_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    pieces = [draw.randbytes(n) for n in (3, MIB, 0, 5 * MIB + 1, 10, 2 * MIB)]
    path = tmp_path / "x"

    with SummedFile("x", path.open("wb")) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)

    data = b"".join(pieces)
    assert path.read_bytes() == data
    assert file.sums == FileSum(len(data), zlib.crc32(data))
    with path.open("rb") as found:
        assert sums_of(found) == file.sums


def test_a_large_file_is_sent_to_the_disk_while_it_is_written() -> None:
    pushed: list[int] = []
    content = io.BytesIO()

    with SummedFile("x", content, lambda file: pushed.append(file.tell())) as file:
        for _ in range(100):
            file.write(bytes(MIB))
            file.flush()

    assert 1 <= len(pushed) <= 3
    assert pushed == sorted(pushed)


def test_what_the_disk_says_to_that_is_raised_at_the_end_and_names_the_file() -> None:
    def push(file: BinaryIO) -> None:
        raise OSError(5, "Input/output error")

    file = SummedFile("x", io.BytesIO(), push)
    file.write(bytes(33 * MIB))
    file.write(bytes(MIB))
    with pytest.raises(OSError, match=r"Input/output error: 'x'"):
        file.close()

    assert file.first_error is not None
    file.close()


def test_no_more_is_read_than_was_asked_for() -> None:
    assert content_of(io.BytesIO(b"abc"), "x", 3) == b"abc"
    with pytest.raises(DamagedCheckpointError, match="x has more than 2 bytes"):
        content_of(io.BytesIO(b"abc"), "x", 2)
