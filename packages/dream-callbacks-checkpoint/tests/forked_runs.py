"""Forked processes that run as ranks and are killed; the step that a new run resumes from."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import training
from training import Filled, make

from dream_trainer.callbacks import Every


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def forked(function: Callable[..., Any], *args: Any, rank: int, num_ranks: int, port: int) -> int:
    """Fork a process that calls a function as a rank of a world of its own."""
    process = os.fork()
    if process:
        return process
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # rank 0 of this world has the store
    with contextlib.suppress(BaseException):
        function(*args)
    os._exit(1)


def wait_for(process: int, within_s: float = 10.0) -> int:
    """Exit status of a process; kills it and raises if it doesn't exit in time."""
    deadline = time.monotonic() + within_s
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"a rank hadn't exited after {within_s} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def last_acknowledged(root: Path) -> int:
    path = root / "acknowledged"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1]) if lines else 0


def resumed_step(root: Path, **fields: Any) -> int:
    """Step that a new trainer resumes from; checks that all of its values are of that step."""
    trainer = make(root, kind=Filled, every=Every(steps=1), **fields)
    trainer.setup()
    step = int(trainer.global_step)
    tensors = [*training.weights(trainer).values(), *training.moments(trainer).values()]
    assert {value for tensor in tensors for value in tensor.unique().tolist()} == {float(step)}
    return step
