"""A wait before forks, where CPython can deadlock the child of a process with gloo threads.

Before CPython 3.11.8 a child never gets the lock over the list of thread states if another thread
held it during the fork (github.com/python/cpython/issues/112275). gloo threads hold it briefly
after a collective, when they release tensors. A loader whose worker deadlocks waits forever.
"""

from __future__ import annotations

import os
import sys
import time

_SETTLE_S = 0.002
_IS_AFFECTED = sys.version_info < (3, 11, 8)
_is_registered = False


def let_threads_settle_before_forks() -> None:
    """Wait a moment for other threads before each fork, on the affected versions of Python."""
    global _is_registered  # noqa: PLW0603  # what is registered at fork stays
    if _IS_AFFECTED and not _is_registered:
        os.register_at_fork(before=_settle)
        _is_registered = True


def _settle() -> None:
    time.sleep(_SETTLE_S)
    sys._current_frames()  # noqa: SLF001  # takes that lock, so it waits until it is free
