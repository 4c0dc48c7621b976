"""Failures under torchrun: messages and timing; a restarted run equals one without failure."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from toy import make

from dream_trainer.testing import run_on_ranks

SCRIPT = Path(__file__).parent / "failing.py"
LIMIT_S = 10.0


def torchrun(*arguments: str) -> list[str]:
    options = ["--standalone", "--nproc-per-node=2", *arguments[:-1]]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), arguments[-1]]


@contextmanager
def running(folder: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """torchrun, once both ranks train."""
    command = [*torchrun(folder), "--wait", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for rank in (0, 1):
                pid_of(rank)
            yield process
        finally:
            process.kill()
            for path in Path().glob("pid-*"):
                if is_alive(int(path.read_text() or 0)):
                    os.kill(int(path.read_text()), signal.SIGKILL)


def pid_of(rank: int) -> int:
    path, deadline_s = Path(f"pid-{rank}"), time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline_s, "no rank has begun to train"
        time.sleep(0.05)
    return int(path.read_text())


def is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def last_line_of(rank: int, stderr: str) -> str:
    return [line for line in stderr.splitlines() if line.startswith(f"[rank{rank}]:")][-1]


def test_torchrun_shows_the_first_error_as_root_cause_and_every_rank_names_it() -> None:
    done = subprocess.run(
        [*torchrun("runs"), "--fail-on=1"], capture_output=True, text=True, timeout=100, check=False
    )
    took_s = time.time() - float(Path("failed_at").read_text())

    assert done.returncode == 1
    assert took_s < LIMIT_S
    cause = r"rank 1 \(pid \d+ on \S+\) failed in FailsInTheFirstAttempt.pre_train_step at step 5"
    for rank in (0, 1):
        line = last_line_of(rank, done.stderr)
        assert re.search(cause + r" \(epoch 0\): ZeroDivisionError: planned$", line), done.stderr
    root_cause = done.stderr[done.stderr.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank +: 1 \(local_rank: 1\)", root_cause)
    assert "ZeroDivisionError: planned" in root_cause


def test_a_killed_rank_is_named_by_the_others() -> None:
    with running("runs") as process:
        killed_at_s, pid = time.monotonic(), pid_of(1)
        os.kill(pid, signal.SIGKILL)
        _, stderr = process.communicate(timeout=60)
        took_s = time.monotonic() - killed_at_s

    assert process.returncode == 1
    assert took_s < LIMIT_S
    assert f"RemoteError: rank 1 (pid {pid} on " in last_line_of(0, stderr)
    assert "exited without reporting an error: killed (SIGKILL" in last_line_of(0, stderr)


@pytest.mark.full
def test_ranks_exit_when_torchrun_is_killed() -> None:
    with running("runs") as process:
        pids = [pid_of(0), pid_of(1)]
        process.kill()
        deadline_s = time.monotonic() + LIMIT_S
        while any(map(is_alive, pids)) and time.monotonic() < deadline_s:
            time.sleep(0.05)

        assert [is_alive(pid) for pid in pids] == [False, False]


@pytest.mark.full
def test_sigterm_to_torchrun_is_not_reported_as_a_failure() -> None:
    with running("runs") as process:
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)

    assert "exited without reporting" not in stderr
    assert "RemoteError" not in stderr


@pytest.mark.full
def test_a_hanging_rank_reports_where_before_torchrun_kills_it() -> None:
    with running("runs", "--hang-on=1") as process:
        time.sleep(2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)

    places = ["_engine_run_backward (", "pre_train_step (failing.py, "]
    for rank, place in enumerate(places):
        said = f"[rank{rank}]: rank {rank} got SIGTERM 25 s ago and is still in {place}"
        assert last_line_of(rank, stderr).startswith(said), stderr


def unbroken(folder: str) -> dict[str, torch.Tensor]:
    trainer, _ = make(folder, n_epochs=2)
    trainer.fit()
    weights: dict[str, torch.Tensor] = trainer.model_state_dict()["model"]
    return weights


def test_a_restarted_run_has_the_weights_of_one_without_failure() -> None:
    expected = run_on_ranks(unbroken, 2, "unbroken")[0]
    restarted = subprocess.run(
        [*torchrun("--max-restarts=1", "restarted"), "--fail-on=1"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert restarted.returncode == 0, restarted.stderr
    assert sorted(restarted.stdout.splitlines()) == [
        f"rank {rank} begins at step {step}" for rank in (0, 1) for step in (0, 4)
    ]
    weights = torch.load("restarted/weights.pt")["model"]
    assert expected.keys() == weights.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
