"""ChunkedFile: a new file that the disk gets while it is written."""

from __future__ import annotations

import contextlib
import fcntl
import io
import mmap
import os
from concurrent.futures import Future, wait
from typing import Any

_CHUNK_BYTES = 1 << 22


class ChunkedFile(io.RawIOBase):
    """A new file, written front to back: while one chunk is filled, a thread writes the other.

    On a file system of a block device (ext4, XFS; not btrfs, ZFS, overlayfs) full chunks go past
    the page cache (O_DIRECT). It would take memory for them, which the host of a virtual machine
    may first have to find: that is what a large save then waits for (`docs/benchmarks`).
    FastPersist, https://arxiv.org/abs/2406.13768, writes so for the sake of fast disks. Elsewhere
    the system is told after each chunk to send it off, where it can be told.

    The disk has all of it after `close` and an fsync.

    Args:
        descriptor: Open for writing, empty; closed with this file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_direct = False
        self._writing: Future[mmap.mmap] | None = None
        self._num_sent_bytes = 0
        self._chunk = _new_chunk()
        self._num_filled = 0

    def write(self, data: Any) -> int:
        """Append bytes; waits while both chunks are full.

        Raises:
            OSError: Of this or an earlier write.
        """
        if self.closed:
            raise ValueError("write to a closed file")
        view = memoryview(data).cast("B")
        begin = 0
        while begin < len(view):
            end = min(begin + _CHUNK_BYTES - self._num_filled, len(view))
            filled = self._num_filled + end - begin
            self._chunk[self._num_filled : filled] = view[begin:end]
            self._num_filled, begin = filled, end
            if filled == _CHUNK_BYTES:
                self._send()
        return len(view)

    def close(self) -> None:
        """Write what is left and close the file; a second call does nothing.

        Raises:
            OSError: Of this or an earlier write.
        """
        if self.closed:
            return
        try:
            if self._writing is not None:
                self._writing.result()
            if self._is_direct:
                _set_direct(self._descriptor, False)  # the rest is no whole number of pages
            _write_at(self._descriptor, self._chunk, self._num_filled, self._num_sent_bytes)
        finally:
            super().close()
            if self._writing is not None:
                wait([self._writing])  # after Ctrl-C too: it would write to the number's next file
            os.close(self._descriptor)

    def _send(self) -> None:
        # Here, since it imports torch: looking at checkpoints does without.
        from dream_trainer.world.daemon_thread import call_in_daemon_thread

        before = self._writing
        if before is None and _is_on_block_device(self._descriptor):
            self._is_direct = _set_direct(self._descriptor, True)
        self._writing = call_in_daemon_thread(
            "checkpoint-file", self._put, self._chunk, self._num_sent_bytes
        )
        self._num_sent_bytes += _CHUNK_BYTES
        self._num_filled = 0
        self._chunk = _new_chunk() if before is None else before.result()

    def _put(self, chunk: mmap.mmap, offset: int) -> mmap.mmap:
        _write_at(self._descriptor, chunk, _CHUNK_BYTES, offset)
        if not self._is_direct and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # it is only a hint
                os.posix_fadvise(self._descriptor, offset, _CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
        return chunk


def _new_chunk() -> mmap.mmap:
    return mmap.mmap(-1, _CHUNK_BYTES)  # begins at a page, as O_DIRECT wants it


def _write_at(descriptor: int, chunk: mmap.mmap, num_bytes: int, offset: int) -> None:
    done = 0
    with memoryview(chunk) as view:
        while done < num_bytes:
            done += os.pwrite(descriptor, view[done:num_bytes], offset + done)


def _is_on_block_device(descriptor: int) -> bool:
    """Whether a file's system is one: across a network many chunks should be on their way, and the
    page cache sees to that.
    """
    return os.major(os.fstat(descriptor).st_dev) != 0


def _set_direct(descriptor: int, is_direct: bool) -> bool:
    """Bypass the page cache from now on, or no longer; False where that can't be."""
    o_direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | o_direct if is_direct else flags & ~o_direct)
    except OSError:
        return False
    return o_direct != 0
