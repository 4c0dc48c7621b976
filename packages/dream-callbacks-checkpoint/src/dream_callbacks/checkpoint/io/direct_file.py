"""DirectFile: a new file whose large blocks bypass the page cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from queue import SimpleQueue

BLOCK_BYTES = 1 << 22


class DirectFile:
    """A sink of ChecksummedWriter on a local file system.

    On a file system of a block device (ext4, XFS; not btrfs, ZFS, overlayfs, tmpfs), full blocks
    are written with O_DIRECT. With it a save needs no page cache memory, which a virtual machine
    may first have to get from its host: large saves took up to seven times as long
    (`docs/benchmarks`). A network file system does better with the page cache, which keeps several
    requests in flight.

    Direct writes are made by a thread, while the caller fills the next block. It starts with the
    first full block, and is a daemon: a disk that hangs doesn't keep Python from exiting.

    Args:
        descriptor: Open for writing, empty; closed with this file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._num_written = 0
        self._is_direct = False
        self._may_be_direct = os.major(os.fstat(descriptor).st_dev) != 0
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()  # Thread.join isn't reliable after Ctrl-C (Python 3.11)
        self._error: BaseException | None = None  # the first one in the thread
        self._blocks: SimpleQueue[memoryview | None] = SimpleQueue()  # None ends the thread
        self._done: SimpleQueue[None] = SimpleQueue()  # one entry per block, and one more:
        self._done.put(None)  # `write` waits for the block before its own

    def write(self, data: memoryview, /) -> None:
        """Append a block; it may be in use until the next `write` or `close` returns.

        Raises:
            OSError: From this or an earlier block.
        """
        if self._may_be_direct and len(data) == BLOCK_BYTES:
            if self._thread is None:
                self._start_thread()
            self._blocks.put(data)
            self._done.get()
            self._raise_error()
        else:
            self._end_thread()
            self._raise_error()
            self._append(data)

    def close(self) -> None:
        """Finish all writes and close the descriptor; its number may then belong to another file.

        Raises:
            OSError: From an earlier block.
        """
        try:
            self._end_thread()
        finally:
            self._end_thread()  # after Ctrl-C too: the thread would write to that other file
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        self._raise_error()

    def _start_thread(self) -> None:
        self._ended.clear()
        self._thread = threading.Thread(
            target=self._append_blocks, name="checkpoint-write", daemon=True
        )
        self._thread.start()

    def _append_blocks(self) -> None:
        while (data := self._blocks.get()) is not None:
            try:
                if self._error is None:
                    self._append(data)
            except BaseException as error:  # noqa: BLE001  # raised by `write` and `close`
                self._error = error
            self._done.put(None)
        self._ended.set()

    def _end_thread(self) -> None:
        """Wait until the thread has written its blocks and ended."""
        if self._thread is None:
            return
        self._blocks.put(None)
        if self._thread.is_alive():  # if Ctrl-C prevented its start, it has no blocks either
            self._ended.wait()
        self._thread = None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _append(self, data: memoryview) -> None:
        self._set_direct(self._may_be_direct and len(data) == BLOCK_BYTES)
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
