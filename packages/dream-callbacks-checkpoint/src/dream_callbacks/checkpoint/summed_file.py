"""SummedFile: a file that knows its size and checksum as soon as it is written."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.manifest import FileSum

_LARGE_BYTES = 1 << 20
_EARLY_BYTES = 1 << 25
_CHUNK_BYTES = 1 << 22
_PIECE_BYTES = 1 << 16


class SummedFile:
    """A new file that keeps its size and checksum while it is written, front to back.

    Args:
        name: For errors.
        file: Open, empty.
        push: Sends to the disk what was written so far. Of a large file it is called beside the
            writing, so that little is left to wait for in the end.

    Attributes:
        first_error: What the file system said first. Whoever writes may hide it: torch says
            "unexpected pos" where the disk is full.
    """

    def __init__(
        self, name: str, file: BinaryIO, push: Callable[[BinaryIO], None] | None = None
    ) -> None:
        self.name = name
        self.first_error: OSError | None = None
        self._file = file
        self._push = push
        self._sums = FileSum(0, 0)
        self._threads: ThreadPoolExecutor | None = None
        self._pushed_bytes = 0
        self._pushing: Future[None] | None = None

    @property
    def sums(self) -> FileSum:
        """Of what was written so far."""
        return self._sums

    def write(self, data: Any) -> int:
        """Append bytes, or anything that holds them."""
        view = memoryview(data).cast("B")
        if len(view) < _LARGE_BYTES:
            crc32 = zlib.crc32(view, self._sums.crc32)
            with self._noting_errors():
                self._file.write(view)
        else:
            crc32 = self._write_large(view)
        self._sums = FileSum(self._sums.num_bytes + len(view), crc32)
        return len(view)

    def tell(self) -> int:
        """How many bytes were written so far."""
        return self._sums.num_bytes

    def flush(self) -> None:
        """Hand what was written to the operating system."""
        with self._noting_errors():
            self._file.flush()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self.flush()
            if self._pushing is not None:
                with self._noting_errors():
                    self._pushing.result()
        finally:
            self._let_go()

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc_value is None:
            self.close()
        else:
            with contextlib.suppress(OSError):  # what is buffered has no room either
                self._let_go()

    def _write_large(self, view: memoryview) -> int:
        """Write, and compute the checksum meanwhile: both let go of the interpreter."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(2, "checkpoint-file")
        summing = self._threads.submit(zlib.crc32, view, self._sums.crc32)
        try:
            with self._noting_errors():
                self._file.write(view)
                self._push_early()
        finally:
            crc32 = summing.result()
        return crc32

    def _push_early(self) -> None:
        if self._push is None or self.tell() - self._pushed_bytes < _EARLY_BYTES:
            return
        if self._pushing is None or self._pushing.done():
            if self._pushing is not None:
                self._pushing.result()
            assert self._threads is not None, "only after a large write"
            self._pushed_bytes = self.tell()
            self._pushing = self._threads.submit(self._push, self._file)

    def _let_go(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
        with self._noting_errors():
            self._file.close()

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.filename is None:
                error.filename = self.name
            self.first_error = self.first_error or error
            raise


def content_of(file: BinaryIO, name: str, max_bytes: int | None = None) -> bytes:
    """All of an open file.

    Raises:
        DamagedCheckpointError: If that is more than `max_bytes`; it isn't read to its end.
    """
    if max_bytes is None:
        return file.read()
    data = bytearray()
    while chunk := file.read(_PIECE_BYTES):  # it takes as much memory as it is asked for
        data += chunk
        if len(data) > max_bytes:
            raise DamagedCheckpointError(f"{name} has more than {max_bytes} bytes")
    return bytes(data)


def sums_of(file: BinaryIO) -> FileSum:
    """Size and checksum of an open file, read from front to back."""
    num_bytes, crc32 = 0, 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # buffered readers have it
        num_bytes, crc32 = num_bytes + count, zlib.crc32(buffer[:count], crc32)
    return FileSum(num_bytes, crc32)
