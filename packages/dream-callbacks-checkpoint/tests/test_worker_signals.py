"""Stop signals with loader workers: the run is saved and resumes, whichever process gets it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny_runs import saved

SCRIPT = Path(__file__).with_name("signalled_training.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LIMIT_S = 60.0


class Cell(NamedTuple):
    """A way in which a run gets a signal.

    Args:
        context: How workers start; None for no workers.
        persistent: Whether workers persist over epochs.
        number: The signal.
        num_ranks: 1 without torchrun.
        target: "process", which is torchrun's agent where there is one, or the "group" of each
            rank, as schedulers and torchrun itself signal it.
    """

    context: str | None
    persistent: bool
    number: signal.Signals
    num_ranks: int
    target: str

    def __str__(self) -> str:
        workers = f"{self.context}{'+persistent' * self.persistent}" if self.context else "none"
        return f"{workers}-{self.number.name}-{self.num_ranks}-{self.target}"

    @property
    def loader_options(self) -> dict[str, Any]:
        if self.context is None:
            return {"num_workers": 0}
        return {
            "num_workers": 2,
            "multiprocessing_context": self.context,
            "persistent_workers": self.persistent,
        }


WORKERS = [(None, False), *itertools.product(("fork", "spawn", "forkserver"), (False, True))]
CELLS = [
    Cell(*workers, number, num_ranks, target)
    for workers, number, num_ranks, target in itertools.product(
        WORKERS, (signal.SIGTERM, signal.SIGINT), (1, 2), ("process", "group")
    )
]
QUICK = {
    "fork-SIGTERM-2-process",
    "fork+persistent-SIGINT-1-group",
    "spawn-SIGTERM-1-group",
    "forkserver+persistent-SIGTERM-1-group",
}


class Script:
    """The script, started in a session of its own."""

    def __init__(self, root: Path, cell: Cell, **options: Any) -> None:
        words = [*(TORCHRUN if cell.num_ranks > 1 else ()), str(SCRIPT), str(root)]
        options = {**cell.loader_options, **options}
        self.log = root / "log"
        self.root = root
        self.num_ranks = cell.num_ranks
        for mark in (*root.glob("ready-*"), *root.glob("steps-*")):
            mark.unlink()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words, json.dumps(options)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill the remaining processes, after a test that failed."""
        marks = (mark.read_text() for mark in self.root.glob("ready-*"))
        for leader in {self.process.pid, *map(int, marks)}:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(leader, signal.SIGKILL)
        self.process.wait()

    def ranks(self) -> list[int]:
        """Process ids of the ranks, once all of them train."""
        marks = [self.root / f"ready-{rank}" for rank in range(self.num_ranks)]
        wait_until(lambda: all(mark.exists() for mark in marks), self.process, self.log)
        return [int(mark.read_text()) for mark in marks]

    def status(self) -> int:
        """Exit status; waits for it."""
        try:
            return self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.log.read_text()) from None

    def steps(self) -> list[list[int]]:
        """The first and the last step of each rank."""
        marks = [self.root / f"steps-{rank}" for rank in range(self.num_ranks)]
        return [json.loads(mark.read_text()) for mark in marks]


def wait_until(
    condition: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path
) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        has_ended = process is not None and process.poll() is not None
        assert not has_ended and time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.02)


def group_is_gone(leader: int) -> bool:
    """Whether no process of a session is left, workers included."""
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return True
    return False


Start = Callable[..., Script]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the script in `tmp_path`; kills it after the test."""
    started: list[Script] = []

    def start_script(cell: Cell, **options: Any) -> Script:
        started.append(Script(tmp_path, cell, **options))
        return started[-1]

    yield start_script
    for script in started:
        script.kill()


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=str(c), marks=() if str(c) in QUICK else pytest.mark.full) for c in CELLS],
)
def test_a_signalled_run_is_saved_by_all_ranks_and_resumed(
    tmp_path: Path, start: Start, cell: Cell
) -> None:
    script = start(cell)
    ranks = script.ranks()

    if cell.target == "process":
        script.process.send_signal(cell.number)
    else:
        for rank in ranks:
            os.killpg(rank, cell.number)
    status = script.status()

    log = script.log.read_text()
    assert status == (-cell.number if cell.num_ranks == 1 else 1), log
    assert "DataLoader worker" not in log
    (checkpoint,) = saved(tmp_path)
    assert checkpoint.manifest.reason == cell.number.name, log
    assert script.steps() == [[0, checkpoint.step]] * cell.num_ranks
    for rank in ranks:
        wait_until(lambda rank=rank: group_is_gone(rank), None, script.log)  # type: ignore[misc]

    resumed = start(cell, max_steps=checkpoint.step + 2)

    assert resumed.status() == 0, resumed.log.read_text()
    assert resumed.steps() == [[checkpoint.step, checkpoint.step + 2]] * cell.num_ranks


def test_workers_of_a_nested_loader_are_protected(tmp_path: Path, start: Start) -> None:
    cell = Cell("fork", False, signal.SIGTERM, 1, "group")
    script = start(cell, wrapped=True)

    (rank,) = script.ranks()
    os.killpg(rank, signal.SIGTERM)

    assert script.status() == -signal.SIGTERM, script.log.read_text()
    assert [checkpoint.manifest.reason for checkpoint in saved(tmp_path)] == ["SIGTERM"]


@pytest.mark.parametrize(
    "context", ["fork", pytest.param("spawn", marks=pytest.mark.full), "forkserver"]
)
def test_workers_exit_when_their_main_process_is_killed(start: Start, context: str) -> None:
    script = start(Cell(context, False, signal.SIGKILL, 1, "process"))
    (main_process,) = script.ranks()

    script.process.kill()
    script.process.wait()

    # torch's workers check for their parent every five seconds.
    wait_until(lambda: group_is_gone(main_process), None, script.log)
