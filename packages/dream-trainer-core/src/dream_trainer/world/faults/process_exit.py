"""The end of a process after a failure, whatever its main thread, other threads and logs do."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
from typing import NoReturn

from dream_trainer.world.faults.failure import Failure, place_of_main_thread

_ATEXIT_S = 1.0
"""Seconds that `atexit` handlers may take after an error."""


def write_line(rank: int, line: str) -> None:
    """Write to standard error, with the prefix that torch gives to tracebacks of a rank."""
    # Not through sys.stderr, whose lock may be held.
    with contextlib.suppress(OSError):
        os.write(2, f"[rank{rank}]: {line}\n".encode())


def exit_now(rank: int, first: Failure | None) -> NoReturn:
    """End the process although the main thread is stuck; writes where, and the first failure."""
    place = place_of_main_thread()
    _flush()
    write_line(rank, f"rank {rank} did not leave {place} in time; exiting")
    write_line(rank, str(first))
    os._exit(1)


def exit_soon() -> None:
    """End the process in a moment, in an `atexit` handler.

    Other ranks may be stuck until the sockets of this process are closed. The rest of the shutdown
    can take seconds or hang, while no Python thread runs; the thread that this starts is in C.
    """
    nowhere = open(os.devnull, "w")  # noqa: SIM115  # until the end
    faulthandler.dump_traceback_later(_ATEXIT_S, exit=True, file=nowhere)


def _flush() -> None:
    """Flush log handlers and standard streams, for at most half a second."""

    def flush() -> None:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    thread.join(0.5)
