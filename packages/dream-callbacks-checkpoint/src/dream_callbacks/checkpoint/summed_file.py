"""SummedFile: a file that knows its size and checksum as soon as it is written."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO

from dream_callbacks.checkpoint.errors import DamagedCheckpointError
from dream_callbacks.checkpoint.format.manifest import FileSum

_LARGE_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
_PIECE_BYTES = 1 << 16


class SummedFile:
    """A new file that keeps its size and checksum while it is written, front to back.

    Args:
        name: For errors.
        file: Open, empty.

    Attributes:
        first_error: What the file system said first. Whoever writes may hide it: torch says
            "unexpected pos" where the disk is full.
    """

    def __init__(self, name: str, file: BinaryIO | io.RawIOBase) -> None:
        self.name = name
        self.first_error: OSError | None = None
        self._file = file
        self._num_bytes = 0
        self._crc32 = 0
        self._small = bytearray()  # not yet written: torch.save writes a tensor in forty pieces

    @property
    def sums(self) -> FileSum:
        """Of the whole file, once it is closed."""
        return FileSum(self._num_bytes, self._crc32)

    def write(self, data: Any) -> int:
        """Append bytes, or anything that holds them.

        Raises:
            OSError: Of this or an earlier write.
        """
        view = memoryview(data).cast("B")
        if len(view) >= _LARGE_BYTES:
            self._write_small()
            self._write_large(view)
        else:
            self._small += view
            if len(self._small) >= _LARGE_BYTES:
                self._write_small()
        self._num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """How many bytes were written so far."""
        return self._num_bytes

    def flush(self) -> None:
        """Nothing: `close` hands over what is left."""

    def close(self) -> None:
        """Close the file; a second call does nothing.

        Raises:
            OSError: Of this or an earlier write.
        """
        if self._file.closed:
            return
        try:
            self._write_small()
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

    def _write_small(self) -> None:
        small, self._small = self._small, bytearray()
        self._crc32 = zlib.crc32(small, self._crc32)
        self._write(small)

    def _write_large(self, view: memoryview) -> None:
        """Write, and compute the checksum meanwhile: both let go of the interpreter."""
        # Here, since it imports torch: looking at checkpoints does without.
        from dream_trainer.world.daemon_thread import call_in_daemon_thread

        summing = call_in_daemon_thread("checkpoint-sum", zlib.crc32, view, self._crc32)
        try:
            self._write(view)
        finally:
            self._crc32 = summing.result()

    def _write(self, data: bytearray | memoryview) -> None:
        if self.first_error is not None:
            raise self.first_error  # a file with a hole must not pass for whole
        with self._noting_errors():
            self._file.write(data)

    def _let_go(self) -> None:
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
