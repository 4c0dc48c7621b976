"""kill -9 at random times during saves: no checkpoint is lost, mixed or refused."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import training
from forked_runs import forked, free_port, last_acknowledged, resumed_step, wait_for
from training import train_until_killed

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
def test_a_kill_at_any_time_loses_no_reported_save(
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
    assert steps == sorted(set(steps)), "each run resumed from the last"
    names = [path.name for path in training.directory(tmp_path).iterdir()]
    assert not [name for name in names if name.startswith(".")], "leftovers are removed"


def kill_repeatedly(
    root: Path, num_kills: int, num_ranks: int, num_victims: int, callback: str
) -> list[int]:
    """Body of a process that forks runs, kills their ranks and checks the checkpoints left."""
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
        # The kill may come between the commit and its report.
        assert acknowledged <= found <= acknowledged + 1
        steps.append(found)
    return steps
