"""A file that knows its sums when it is written, and the first error of its file system."""

from __future__ import annotations

import io
import random
import zlib
from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.checkpoint import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum
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


def test_after_an_error_nothing_more_is_written_and_closing_raises_it() -> None:
    class FailsOnce(io.BytesIO):
        def write(self, data: Any) -> int:
            if not written:
                written.append(data)
                raise OSError(28, "No space left on device")
            return super().write(data)

    written: list[Any] = []
    content = FailsOnce()
    file = SummedFile("x", content)
    file.write(bytes(10))
    with pytest.raises(OSError, match=r"No space left on device: 'x'") as first:
        file.write(bytes(2 * MIB))
    for call in (lambda: file.write(bytes(2 * MIB)), file.close):
        with pytest.raises(OSError, match="No space left on device") as again:
            call()
        assert again.value is first.value

    assert file.first_error is first.value
    assert content.closed
    file.close()


def test_small_pieces_are_written_together() -> None:
    sizes = []

    class Sizes(io.BytesIO):
        def write(self, data: Any) -> int:
            sizes.append(len(data))
            return super().write(data)

    with SummedFile("x", Sizes()) as file:
        for size in (*[40] * 1000, MIB, *[MIB // 2] * 3, 5):
            file.write(bytes(size))
            file.flush()

    assert sizes == [40_000, MIB, MIB, MIB // 2 + 5]
    assert file.tell() == file.sums.num_bytes == sum(sizes)


def test_no_more_is_read_than_was_asked_for() -> None:
    assert content_of(io.BytesIO(b"abc"), "x", 3) == b"abc"
    with pytest.raises(DamagedCheckpointError, match="x has more than 2 bytes"):
        content_of(io.BytesIO(b"abc"), "x", 2)
