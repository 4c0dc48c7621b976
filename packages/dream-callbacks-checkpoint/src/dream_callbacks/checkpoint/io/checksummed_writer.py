"""ChecksummedWriter: write a new file and compute its size and CRC-32 on the way."""

from __future__ import annotations

import contextlib
import mmap
import zlib
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum
from dream_callbacks.checkpoint.io.direct_file import BLOCK_BYTES

_CACHED_BYTES = 1 << 18  # copied and checksummed together: fits the L2 cache
_READ_BYTES = 1 << 16


class Sink(Protocol):
    """Where a ChecksummedWriter puts its blocks: `DirectFile`, or a file opened by fsspec."""

    def write(self, data: memoryview, /) -> object:
        """Append a block, which may still be read until the next `write` or `close` returns."""

    def close(self) -> object: ...


class ChecksummedWriter:
    """A new file, written front to back in large blocks.

    Small writes are gathered: torch.save writes each tensor in about forty pieces. Nothing is
    synced; see `LocalFilesystem.sync`.

    Args:
        name: For error messages.
        sink: Empty; closed with this file.

    Attributes:
        first_error: The first exception during a write, KeyboardInterrupt included. Every later
            `write` and `close` raises it again, since the file has a hole. So does leaving the
            `with` block by another error: torch reports "unexpected pos" when the disk is full.
    """

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.first_error: BaseException | None = None
        self.closed = False
        self._sink = sink
        # Page-aligned, as O_DIRECT requires. One is filled while the other one is written.
        self._block, self._other_block = (mmap.mmap(-1, BLOCK_BYTES) for _ in range(2))
        self._num_filled = 0
        self._num_bytes = 0
        self._crc32 = 0

    @property
    def sums(self) -> FileSum:
        """Size and checksum of what was written so far."""
        return FileSum(self._num_bytes, self._crc32)

    def write(self, data: Any) -> int:
        """Append a bytes-like object.

        Raises:
            ValueError: If the file is closed.
            OSError: From this or an earlier write.
        """
        if self.closed:
            raise ValueError(f"write to a closed file: {self.name}")
        self._raise_first_error()
        view = memoryview(data).cast("B")
        try:
            begin = 0
            while begin < len(view):
                begin += self._append(view[begin : begin + _CACHED_BYTES])
        except BaseException as error:
            self._note(error)
            raise
        return len(view)

    def tell(self) -> int:
        """Number of bytes written so far."""
        return self._num_bytes

    def flush(self) -> None:
        """Do nothing: `close` writes the rest."""

    def close(self) -> None:
        """Write the rest and close the file; a second call does nothing.

        Raises:
            OSError: From this or an earlier write.
        """
        if self.closed:
            return
        try:
            self._raise_first_error()
            self._write_block()
        except BaseException as error:
            self._note(error)
            with contextlib.suppress(OSError):
                self._close_sink()
            raise
        self._close_sink()

    def __enter__(self) -> ChecksummedWriter:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_value is None:
            self.close()
            return
        first_error = self.first_error
        if not self.closed:
            with contextlib.suppress(OSError):
                self._close_sink()
        if first_error is not None and first_error is not exc_value:
            if isinstance(exc_value, Exception):
                raise first_error from exc_value

    def _append(self, piece: memoryview) -> int:
        """Append the part of a piece that fits into the block; its size."""
        num_added = min(len(piece), BLOCK_BYTES - self._num_filled)
        end = self._num_filled + num_added
        self._block[self._num_filled : end] = piece[:num_added]
        # Computed over the copy, which is what is written.
        with memoryview(self._block) as block:
            self._crc32 = zlib.crc32(block[self._num_filled : end], self._crc32)
        self._num_filled = end
        self._num_bytes += num_added
        if end == BLOCK_BYTES:
            self._write_block()
        return num_added

    def _write_block(self) -> None:
        if self._num_filled:
            self._sink.write(memoryview(self._block)[: self._num_filled])
            self._block, self._other_block = self._other_block, self._block
            self._num_filled = 0

    def _close_sink(self) -> None:
        self.closed = True
        try:
            self._sink.close()
        except BaseException as error:
            self._note(error)
            raise

    def _raise_first_error(self) -> None:
        if self.first_error is not None:
            raise self.first_error

    def _note(self, error: BaseException) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = self.name
        self.first_error = self.first_error or error


def content_of(file: BinaryIO, name: str, max_bytes: int | None = None) -> bytes:
    """Read all of an open file.

    Raises:
        DamagedCheckpointError: If it has more than `max_bytes`; no more than that is read.
    """
    if max_bytes is None:
        return file.read()
    data = bytearray()
    while piece := file.read(_READ_BYTES):  # allocates as much as it is asked for
        data += piece
        if len(data) > max_bytes:
            raise DamagedCheckpointError(f"{name} has more than {max_bytes} bytes")
    return bytes(data)


def sums_of(file: BinaryIO) -> FileSum:
    """Size and checksum of an open file, read from front to back."""
    num_bytes, crc32 = 0, 0
    buffer = memoryview(bytearray(BLOCK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # buffered readers have it
        num_bytes, crc32 = num_bytes + count, zlib.crc32(buffer[:count], crc32)
    return FileSum(num_bytes, crc32)
