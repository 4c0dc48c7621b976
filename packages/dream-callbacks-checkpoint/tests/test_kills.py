"""kill -9 at random moments of saves: no checkpoint is lost, mixed up or refused."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training
from training import Filled, make, train_until_killed

from dream_trainer.callbacks import Every
from dream_trainer.testing import run_on_ranks

FULL = [pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("callback", training.CALLBACKS)
@pytest.mark.parametrize(
    ("num_ranks", "num_victims", "num_kills"),
    [
        (1, 1, 15),
        (2, 2, 5),
        (2, 1, 3),
        pytest.param(1, 1, 300, marks=FULL),
        pytest.param(2, 2, 200, marks=FULL),
        pytest.param(2, 1, 50, marks=FULL),
    ],
)
def test_a_kill_at_any_moment_loses_nothing_that_was_called_saved(
    tmp_path: Path, callback: str, num_ranks: int, num_victims: int, num_kills: int
) -> None:
    (steps,) = run_on_ranks(
        kill_repeatedly,
        1,
        tmp_path,
        num_kills,
        num_ranks,
        num_victims,
        callback,
        timeout_s=100 + 3 * num_kills,
    )

    assert len(steps) == num_kills
    assert steps == sorted(set(steps)), "each run went on from the last"
    names = [path.name for path in training.directory(tmp_path).iterdir()]
    assert not [name for name in names if name.startswith(".")], "leftovers are removed"


def kill_repeatedly(
    root: Path, num_kills: int, num_ranks: int, num_victims: int, callback: str
) -> list[int]:
    """Body of a process that forks runs, kills ranks of them, and looks at what they leave."""
    draw = random.Random(num_ranks)
    steps = []
    for _ in range(num_kills):
        before = last_acknowledged(root)
        port = free_port()
        processes = [
            forked(train_until_killed, root, callback, rank=rank, num_ranks=num_ranks, port=port)
            for rank in range(num_ranks)
        ]
        deadline = time.monotonic() + 30
        while last_acknowledged(root) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.1))
        draw.shuffle(processes)
        for process in processes[:num_victims]:
            os.kill(process, signal.SIGKILL)
        for process in processes:
            wait_for(process)
        acknowledged, found = last_acknowledged(root), resumed_step(root)
        assert acknowledged > before, "it trained"
        # A kill may come between the commit and its announcement.
        assert acknowledged <= found <= acknowledged + 1
        steps.append(found)
    return steps


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def forked(function: Callable[..., Any], *args: Any, rank: int, num_ranks: int, port: int) -> int:
    """Process that calls a function as a rank of its own world."""
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
    """Exit status of a process that ends by itself; if it doesn't it is ended: an error."""
    deadline = time.monotonic() + within_s
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise AssertionError(f"a rank was still there after {within_s} s")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1])


def last_acknowledged(root: Path) -> int:
    path = root / "acknowledged"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1]) if lines else 0


def resumed_step(root: Path, **fields: Any) -> int:
    """The step that a new trainer continues from, all of whose numbers must be that step."""
    trainer = make(root, kind=Filled, every=Every(steps=1), **fields)
    trainer.setup()
    step = int(trainer.global_step)
    tensors = [*training.weights(trainer).values(), *training.moments(trainer).values()]
    assert {value for tensor in tensors for value in tensor.unique().tolist()} == {float(step)}
    return step
