"""Imported by the forkserver of a protected loader, which starts with signals blocked.

The server keeps them blocked: its workers exit when it does. All processes that it forks get them
unblocked.
"""

from __future__ import annotations

import os
import signal

_BLOCKED = signal.pthread_sigmask(signal.SIG_BLOCK, ())

os.register_at_fork(
    after_in_child=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED) and None
)
