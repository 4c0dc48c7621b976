"""Power loss: the disk holds every reported checkpoint at any time.

The disk is a file system on an image file. The run is halted and the image is copied, which is the
state after a power loss; the copy is mounted, which replays its journal as at boot.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import training
from forked_runs import last_acknowledged, resumed_step
from mounts import have_mounts_of_its_own, mount, new_image, skip_unless_mountable

from dream_trainer.testing import run_on_ranks

OPTIONS = ["commit=1", "commit=5", "commit=5,data=writeback"]


@pytest.fixture(autouse=True)
def _can_mount(tmp_path: Path) -> None:
    skip_unless_mountable(tmp_path, "ext4")


@contextlib.contextmanager
def mounted(image: Path, folder: Path, options: str) -> Iterator[Path]:
    mount("ext4", f"loop,{options}", image, folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def power_lost_repeatedly(folder: Path, callback: str, options: str, times: int) -> list[int]:
    """Steps resumed from the copied disk; each is at least the last reported one."""
    have_mounts_of_its_own()
    draw = random.Random(times)
    image, copy = new_image(folder / "disk.img", 256 << 20), folder / "copy.img"
    outside = folder / "outside"
    outside.mkdir()
    steps = []
    with mounted(image, folder / "disk", options) as disk:
        process = os.fork()
        if process == 0:
            # Reported saves are recorded on another disk.
            (disk / "acknowledged").symlink_to(outside / "acknowledged")
            with contextlib.suppress(BaseException):
                training.train_until_killed(disk, callback)
            os._exit(1)
        try:
            deadline = time.monotonic() + 30
            while not last_acknowledged(outside) and time.monotonic() < deadline:
                time.sleep(0.01)
            for _ in range(times):
                time.sleep(draw.uniform(0, 0.3))
                os.kill(process, signal.SIGSTOP)
                acknowledged = last_acknowledged(outside)
                shutil.copyfile(image, copy)
                os.kill(process, signal.SIGCONT)
                with mounted(copy, folder / "copy", options) as found:
                    steps.append(resumed_step(found))
                assert steps[-1] >= acknowledged > 0
        finally:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return steps


@pytest.mark.parametrize("callback", training.CALLBACKS)
@pytest.mark.parametrize(
    ("options", "times"),
    [
        ("commit=5", 5),
        *(
            pytest.param(options, 35, marks=[pytest.mark.full, pytest.mark.timeout(900)])
            for options in OPTIONS
        ),
    ],
)
def test_power_loss_loses_no_reported_save(
    tmp_path: Path, callback: str, options: str, times: int
) -> None:
    (steps,) = run_on_ranks(
        power_lost_repeatedly, 1, tmp_path, callback, options, times, timeout_s=30 + 15 * times
    )

    assert len(steps) == times
    assert steps == sorted(steps)
