"""Finding and killing wandb-core child processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

_NAME = "wandb-core"


def running_services() -> set[int]:
    """Process ids of the wandb-core children of this process."""
    processes = _from_proc() if Path("/proc/self/stat").exists() else _from_ps()
    return {pid for pid, parent, name in processes if parent == os.getpid() and _NAME in name}


def kill_services(pids: Iterable[int]) -> None:
    """Kill processes with SIGKILL; a stopped process ignores other signals."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _from_proc() -> Iterator[tuple[int, int, str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state parent …", and the name may hold spaces and brackets.
            head, _, tail = path.read_text(errors="replace").rpartition(")")
        except OSError:
            continue  # exited since it was listed
        state, parent = tail.split()[:2]
        if state != "Z":
            yield int(path.parent.name), int(parent), head.partition("(")[2]


def _from_ps() -> Iterator[tuple[int, int, str]]:
    try:
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,comm="],
            capture_output=True,
            text=True,
            check=False,
            timeout=5.0,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in listing.splitlines():
        pid, parent, name = line.split(None, 2)
        yield int(pid), int(parent), name
