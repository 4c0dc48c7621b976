"""ChecksummedWriter: write a new file and compute its size and CRC-32 on the way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import zlib
from types import TracebackType
from typing import Any, BinaryIO, Protocol

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum

_BLOCK_BYTES = 1 << 22
_CACHED_BYTES = 1 << 18  # copied and checksummed together: fits the L2 cache
_READ_BYTES = 1 << 16


class Sink(Protocol):
    """Where a ChecksummedWriter puts its blocks: `DirectFile`, or a file opened by fsspec."""

    def write(self, data: memoryview, /) -> object: ...

    def close(self) -> object: ...


class ChecksummedWriter:
    """A new file, written front to back in large blocks.

    Small writes are gathered: torch.save writes each tensor in about forty pieces. Nothing is
    synced; see `LocalFilesystem.sync`.

    Args:
        name: For error messages.
        sink: Empty; closed with this file. Doesn't keep the blocks it is given.

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
        self._block = mmap.mmap(-1, _BLOCK_BYTES)  # page-aligned, as O_DIRECT requires
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
            raise
        finally:
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
        num_added = min(len(piece), _BLOCK_BYTES - self._num_filled)
        end = self._num_filled + num_added
        self._block[self._num_filled : end] = piece[:num_added]
        # Computed over the copy, which is what is written.
        with memoryview(self._block) as block:
            self._crc32 = zlib.crc32(block[self._num_filled : end], self._crc32)
        self._num_filled = end
        self._num_bytes += num_added
        if end == _BLOCK_BYTES:
            self._write_block()
        return num_added

    def _write_block(self) -> None:
        if self._num_filled:
            self._sink.write(memoryview(self._block)[: self._num_filled])
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


class DirectFile:
    """A sink on a local file system; full blocks bypass the page cache on block devices.

    With O_DIRECT a save needs no page cache memory, which a virtual machine may first have to get
    from its host: large saves took up to seven times as long with it (`docs/benchmarks`).
    It is used on file systems of a block device (ext4, XFS; not btrfs, ZFS, overlayfs, tmpfs). A
    network file system does better with the page cache, which keeps several requests in flight.

    Args:
        descriptor: Open for writing, empty; closed with this file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._num_written = 0
        self._is_direct = False
        self._may_be_direct = os.major(os.fstat(descriptor).st_dev) != 0

    def write(self, data: memoryview, /) -> None:
        """Append a block; only a full one bypasses the page cache."""
        self._set_direct(self._may_be_direct and len(data) == _BLOCK_BYTES)
        start = self._num_written
        while data:
            try:
                num_written = os.pwrite(self._descriptor, data, self._num_written)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                # Some file systems accept the flag and refuse the write; and after a short write
                # (disk nearly full) the rest isn't aligned. Without it, the real error shows.
                self._may_be_direct = False
                self._set_direct(False)
                continue
            self._num_written += num_written
            data = data[num_written:]
        if not self._is_direct and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # only a hint: start writing it to the disk
                num_bytes = self._num_written - start
                os.posix_fadvise(self._descriptor, start, num_bytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor; its number may belong to another file from then on."""
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _set_direct(self, is_direct: bool) -> None:
        if is_direct == self._is_direct:
            return
        o_direct = getattr(os, "O_DIRECT", 0)  # macOS has none
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        flags = flags | o_direct if is_direct else flags & ~o_direct
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
        except OSError:
            if not is_direct:
                raise
            self._may_be_direct = False
        else:
            self._is_direct = is_direct


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
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # buffered readers have it
        num_bytes, crc32 = num_bytes + count, zlib.crc32(buffer[:count], crc32)
    return FileSum(num_bytes, crc32)
