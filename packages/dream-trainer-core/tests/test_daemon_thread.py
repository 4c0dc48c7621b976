"""A thread that a process may end without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dream_trainer.world.daemon_thread import call_in_daemon_thread


def test_what_becomes_of_a_call_is_told() -> None:
    assert call_in_daemon_thread("adds", sum, [1, 2]).result(timeout=10) == 3
    with pytest.raises(ZeroDivisionError):
        call_in_daemon_thread("divides", divmod, 1, 0).result(timeout=10)


def test_a_call_that_never_ends_keeps_no_process_from_ending() -> None:
    script = (
        "import time\n"
        "from dream_trainer.world.daemon_thread import call_in_daemon_thread\n"
        "call_in_daemon_thread('hangs', time.sleep, 3600)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=30, check=False)

    assert ended.returncode == 0
