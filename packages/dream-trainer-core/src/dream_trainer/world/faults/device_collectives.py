"""DeviceCollectives: detects that an NCCL collective has failed, and aborts those that never end.

An NCCL collective is a kernel on the device. If it fails, or waits for a rank that never joins it,
no Python code gets an error: the main thread runs ahead, or waits for the device in C++ code. Only
the watchdog thread of torch notices. Left to itself, it ends the process, also while callbacks
clean up; `leave_failures_to_python` prevents that.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path

from dream_trainer.world import torch_private
from dream_trainer.world.daemon_thread import call_in_daemon_thread

_WHAT = {"TIMEOUT": "timed out", "COMM_ERROR": "failed", "REMOTE_ERROR": "failed on another rank"}
"""What has happened, by the name of torch's ErrorType."""

_TRACE_S = 2.0
"""Longest wait for the flight recorder; its thread checks once a second whether to write."""


def leave_failures_to_python() -> None:
    """Keep torch's watchdog from ending the process; for process groups that are made later.

    After an error of CUDA it would do so within 100 ms, while the main thread reports the error
    and callbacks clean up; after a timeout, once the flight recorder is written. The first variable
    turns off both, the second one turns the latter on again in versions of torch that have it.
    Variables that the user has set stay.
    """
    os.environ.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    os.environ.setdefault("TORCH_NCCL_TEARDOWN_ON_TIMEOUT", "1")


class DeviceCollectives:
    """The NCCL collectives of this process; there are none with gloo. For any thread.

    Args:
        rank: This rank.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._aborting: list[Future[None]] | None = None

    @property
    def are_aborted(self) -> bool:
        """Whether some were aborted, so that results on the device may be wrong."""
        return bool(self._aborting)

    def failure(self) -> str | None:
        """What torch's watchdog has found, if a collective has failed or timed out."""
        for group, backend in torch_private.nccl_backends():
            what = _WHAT.get(torch_private.nccl_error(backend))
            if what is not None:
                return f"an NCCL collective {what} (group {group})"
        return None

    def trace_file(self, since_s: float) -> Path | None:
        """Wait for the file in which torch's flight recorder lists the last collectives.

        Args:
            since_s: Unix time in seconds; older files are from earlier failures.

        Returns:
            None if nothing was written in time: the recorder may be turned off.
        """
        path = torch_private.flight_recorder_file(self._rank)
        give_up_s = time.monotonic() + _TRACE_S
        while not (path.exists() and path.stat().st_mtime >= since_s):
            if time.monotonic() >= give_up_s:
                return None
            time.sleep(0.05)
        return path

    def abort(self) -> list[Future[None]]:
        """End the collectives in flight, in threads; a second call does nothing.

        A main thread that waits for one then continues, with an undefined result. Later calls of
        collectives raise `torch.distributed.DistBackendError`.

        Returns:
            Done when the groups are aborted.
        """
        if self._aborting is None:
            # All at the same time: an abort waits for the kernels of the other groups.
            self._aborting = [
                call_in_daemon_thread("abort-collectives", backend.abort)
                for _, backend in torch_private.nccl_backends()
            ]
        return self._aborting
