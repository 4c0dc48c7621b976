"""call_in_daemon_thread: a thread that doesn't delay the exit of its process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dream_trainer.world.daemon_thread import call_in_daemon_thread


def test_the_future_has_the_result_or_the_error() -> None:
    assert call_in_daemon_thread("adds", sum, [1, 2]).result(timeout=10) == 3
    with pytest.raises(ZeroDivisionError):
        call_in_daemon_thread("divides", divmod, 1, 0).result(timeout=10)


def test_a_call_that_never_returns_does_not_keep_the_process_from_exiting() -> None:
    script = (
        "import time\n"
        "from dream_trainer.world.daemon_thread import call_in_daemon_thread\n"
        "call_in_daemon_thread('hangs', time.sleep, 3600)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], timeout=30, check=False)

    assert ended.returncode == 0
