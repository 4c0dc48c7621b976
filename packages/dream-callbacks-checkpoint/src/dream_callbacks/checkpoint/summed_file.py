"""SummedFile: a file that knows its size and checksum as soon as it is written."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO

from dream_callbacks.checkpoint.manifest import FileSum

_LARGE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22


class SummedFile:
    """A new file that keeps its size and checksum while it is written, front to back.

    Closing it waits until it lasts.

    Args:
        name: For errors.
        file: Open, empty.
        sync: Waits until the disk has what was flushed.

    Attributes:
        first_error: What the file system said first. Whoever writes may hide it: torch says
            "unexpected pos" where the disk is full.
    """

    def __init__(
        self, name: str, file: BinaryIO, sync: Callable[[BinaryIO], None] = lambda file: None
    ) -> None:
        self.name = name
        self.first_error: OSError | None = None
        self._sums = FileSum(0, 0)
        self._summing: ThreadPoolExecutor | None = None
        self._file = file
        self._sync = sync

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
            # Both let go of the interpreter, so that the checksum takes no time of its own.
            if self._summing is None:
                self._summing = ThreadPoolExecutor(1, "checksum")
            future = self._summing.submit(zlib.crc32, view, self._sums.crc32)
            try:
                with self._noting_errors():
                    self._file.write(view)
            finally:
                crc32 = future.result()
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
        """Close the file, once all of it lasts; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self.flush()
            with self._noting_errors():
                self._sync(self._file)
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

    def _let_go(self) -> None:
        if self._summing is not None:
            self._summing.shutdown()
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


def sums_of(file: BinaryIO) -> FileSum:
    """Size and checksum of an open file, read from front to back."""
    num_bytes, crc32 = 0, 0
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while count := file.readinto(buffer):  # type: ignore[attr-defined]  # buffered readers have it
        num_bytes, crc32 = num_bytes + count, zlib.crc32(buffer[:count], crc32)
    return FileSum(num_bytes, crc32)
