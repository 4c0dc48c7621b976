"""Trains the toy and saves every second step; options make a rank fail or hang.

torchrun --nproc-per-node=2 failing.py FOLDER [--fail-on RANK] [--wait] [--hang-on RANK]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from toy import make

from dream_trainer import DreamTrainer
from dream_trainer.callbacks import Callback, CheckpointCallback, Every, LoggerCallback
from dream_trainer.configs import CheckpointParameters
from dream_trainer.entrypoint import entrypoint


class FailsInTheFirstAttempt(Callback[DreamTrainer]):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        is_first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        due = self.trainer.global_step == 5 and self.trainer.world.rank == self.rank
        if is_first_attempt and due:
            Path("failed_at").write_text(str(time.time()))
            raise ZeroDivisionError("planned")


class Waits(Callback[DreamTrainer]):
    """Slows down each step; each rank writes its process id once it trains."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.05)
        Path(f"pid-{self.trainer.world.rank}").write_text(str(os.getpid()))


class Hangs(Callback[DreamTrainer]):
    def __init__(self, rank: int) -> None:
        self.rank = rank

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        while self.trainer.global_step == 2 and self.trainer.world.rank == self.rank:
            time.sleep(1)


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fail-on", type=int)
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--hang-on", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trainer, _ = make(options.folder, n_epochs=100 if options.wait else 2)
    parameters = CheckpointParameters(every=Every(steps=2), keep_last=2)
    trainer.callbacks.append(CheckpointCallback(parameters))
    trainer.callbacks.append(LoggerCallback(1))
    if options.fail_on is not None:
        trainer.callbacks.append(FailsInTheFirstAttempt(options.fail_on))
    if options.wait:
        trainer.callbacks.append(Waits())
    if options.hang_on is not None:
        trainer.callbacks.append(Hangs(options.hang_on))
    trainer.setup()
    sys.stdout.write(f"rank {trainer.world.rank} begins at step {trainer.global_step}\n")
    sys.stdout.flush()
    trainer.fit()
    if trainer.world.is_global_zero:
        torch.save(trainer.model_state_dict(), options.folder / "weights.pt")


if __name__ == "__main__":
    main()
