"""Time to list many checkpoints in one directory, and to start a run there.

    python tools/benchmarks/checkpoint_directory.py [--checkpoints N]

Writes only manifests: neither of the two reads tensors.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dream_callbacks.checkpoint.format.file_names import MANIFEST, checkpoint_name
from dream_callbacks.checkpoint.format.manifest import FileSum, Manifest
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.manager import CheckpointManager
from dream_callbacks.checkpoint.retention import KeepRules
from dream_trainer.configs import DeviceParameters
from dream_trainer.world import World

GOAL_S = 1.0
FILES = ("__0_0.distcp", ".metadata", "index.json", "rank-00000.json", "state.json")


def fill(root: Path, num_checkpoints: int) -> None:
    """Write manifests."""
    filesystem = LocalFilesystem(root)
    for step in range(1, num_checkpoints + 1):
        manifest = Manifest(
            step=step,
            epoch=0,
            seq=step,
            run="0" * 32,
            fence=1,
            created_unix=time.time(),
            reason="every step",
            world_size=1,
            shape={"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1},
            dp_ranks=(0,),
            num_train_batches=num_checkpoints,
            metrics={"val_loss": 1 / step},
            files=dict.fromkeys(FILES, FileSum(1000, 12345)),
        )
        name = checkpoint_name(step)
        filesystem.make(name)
        filesystem.write(name, MANIFEST, manifest.encode())


def ls(root: Path) -> None:
    """Time of the command."""
    command = [sys.executable, "-m", "dream_callbacks.checkpoint", "ls", str(root)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def start(root: Path) -> None:
    """Time of what a trainer does before verifying the newest checkpoint and before training."""
    manager = CheckpointManager(
        root, World(DeviceParameters.SINGLE_DEVICE(device="cpu")), KeepRules(last=None)
    )
    manager.open()
    manager.close()
    manager.open()
    manager.close()


def median_s(run: Callable[[Path], None], root: Path) -> float:
    times_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        run(root)
        times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=10_000, metavar="N")
    num_checkpoints = parser.parse_args().checkpoints
    for count in (10, num_checkpoints):
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), count)
            print(
                f"{count:6d} checkpoints: ls {median_s(ls, Path(folder)):.2f} s, "
                f"a run's start {median_s(start, Path(folder)):.2f} s; goal {GOAL_S:g} s each"
            )


if __name__ == "__main__":
    main()
