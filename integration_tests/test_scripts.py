"""The same script, unchanged: as one process, under torchrun with DDP and FSDP, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).parent / "toy.py"
ALONE = [sys.executable]
ON_TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def outcome(tmp_path: Path, start: list[str], layout: str) -> dict[str, Any]:
    out = tmp_path / f"{layout}.json"
    done = subprocess.run(
        [*start, TOY, "--layout", layout, "--out", out],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_losses_agree_for_every_way_to_start_the_script(tmp_path: Path) -> None:
    alone = outcome(tmp_path, ALONE, "ddp")
    assert (alone["world_size"], alone["process_group"]) == (1, False)
    assert len(alone["losses"]) == 16

    for layout in ("ddp", "fsdp"):
        ranks = outcome(tmp_path, ON_TWO_RANKS, layout)
        assert (ranks["world_size"], ranks["process_group"]) == (2, True)
        assert ranks["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def interrupted(start: list[str]) -> tuple[int, str]:
    process = subprocess.Popen(
        [*start, TOY, "--sleep"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert "training" in process.stdout.readline()
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def test_ctrl_c_closes_callbacks_and_exits_with_the_status_of_sigint(tmp_path: Path) -> None:
    status, stderr = interrupted(ALONE)

    # Killed by SIGINT, which a shell reports as 130.
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in stderr
    assert (tmp_path / "closed-0").exists()


def test_ctrl_c_under_torchrun_closes_callbacks_on_every_rank(tmp_path: Path) -> None:
    status, _ = interrupted(ON_TWO_RANKS)

    assert status != 0
    assert (tmp_path / "closed-0").exists()
    assert (tmp_path / "closed-1").exists()
