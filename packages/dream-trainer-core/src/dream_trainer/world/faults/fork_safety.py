"""Forks beside the threads of a process group, where Python can let the child hang.

Before CPython 3.11.8 a child never gets the lock over the list of thread states if another thread
had it during the fork (github.com/python/cpython/issues/112275). Threads of gloo take it for a
moment after a collective, when they give tensors back. A loader whose worker hangs so waits for
ever.
"""

from __future__ import annotations

import os
import sys
import time

_SETTLE_S = 0.002
_IS_AFFECTED = sys.version_info < (3, 11, 8)
_is_registered = False


def let_threads_settle_before_forks() -> None:
    """Let each fork of this process wait a moment for other threads, where Python needs that."""
    global _is_registered  # noqa: PLW0603  # what is registered at fork stays
    if _IS_AFFECTED and not _is_registered:
        os.register_at_fork(before=_settle)
        _is_registered = True


def _settle() -> None:
    time.sleep(_SETTLE_S)
    sys._current_frames()  # noqa: SLF001  # takes that lock, so it waits for who has it
