"""LocalProcesses: detects the exit of the other ranks' processes on this machine.

A pidfd reports any exit at once, whatever the main threads are waiting for. Sockets don't: data
loader workers inherit them and keep them open.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store


class LocalProcesses:
    """The processes of the other ranks on this machine; none where the system has no pidfds.

    Args:
        store: Ranks exchange their process ids through it.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        waker: File descriptor. Bytes written to it end a `wait`, which returns them.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self._store = store
        self._rank = rank
        self._key = f"processes/{machine_id()}"
        self._num_expected = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        self._known: set[int] = set()
        self._ranks: dict[int, tuple[int, int]] = {}  # by file descriptor
        self._poll = select.poll()
        self._wake_up, self.waker = os.pipe()
        os.set_blocking(self.waker, False)
        self._poll.register(self._wake_up, select.POLLIN)
        if hasattr(os, "pidfd_open"):
            # torch's stubs lack it
            store.append(self._key, f"{rank} {os.getpid()}\n")  # type: ignore[attr-defined]

    def wait(self, timeout_s: float) -> tuple[list[tuple[int, int]], bytes]:
        """Wait until a local process exits, bytes are written to `waker`, or the timeout.

        Returns:
            Ranks and process ids of processes that exited since the last call, and the bytes
            written to `waker`.
        """
        ended, written = [], b""
        for descriptor, _ in self._poll.poll(timeout_s * 1000):
            if descriptor == self._wake_up:
                written = os.read(descriptor, 4096)
            else:
                ended.append(self._ranks.pop(descriptor))
                self._poll.unregister(descriptor)
                os.close(descriptor)
        return ended, written

    def find_new(self) -> list[tuple[int, int]]:
        """Find processes that started since the last call; returns those that have exited."""
        ended: list[tuple[int, int]] = []
        if len(self._known) >= self._num_expected or not self._store.check([self._key]):
            return ended
        for line in self._store.get(self._key).decode().splitlines():
            rank, pid = map(int, line.split())
            if rank in self._known:
                continue
            self._known.add(rank)
            if rank == self._rank:
                continue
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                ended.append((rank, pid))
            except OSError:  # a sandbox forbids it
                continue
            else:
                self._ranks[descriptor] = (rank, pid)
                self._poll.register(descriptor, select.POLLIN)
        return ended

    def wake(self) -> None:
        """Make `wait` return now."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.waker, b"\0")

    def close(self) -> None:
        """Close all file descriptors."""
        for descriptor in (*self._ranks, self._wake_up, self.waker):
            os.close(descriptor)


def machine_id() -> str:
    """Id of the boot and PID namespace: equal for processes that can see each other's ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  # not a path
    except OSError:
        return socket.gethostname()
