"""Runs with W&B, each in its own process: `python wandb_runs.py NAME DIRECTORY`."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dream_callbacks.logging import (
    JSONLinesSink,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    ModelWatchCallback,
    WandBSink,
)
from dream_callbacks.logging.sinks.wandb_service import running_services
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, tiny_config


class PictureTrainer(TinyTrainer):
    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return super().validation_step(batch, batch_idx) | {
            "pictures": torch.rand(2, 3, 8, 8),
            "clips": torch.rand(1, 4, 3, 8, 8),
        }


class AtStep(Callback[Any]):
    """Calls a function at a step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step = step
        self.function = function

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step == self.step:
            self.function()


def report(**values: Any) -> None:
    sys.stdout.write(json.dumps(values) + "\n")


def logger(**options: Any) -> LoggerCallback:
    return LoggerCallback(1, sinks=[JSONLinesSink(), WandBSink(**{"mode": "offline", **options})])


def offline(directory: Path) -> None:
    callbacks = [
        logger(tags=["tiny"], notes="a note"),
        LRLoggerCallback(),
        MediaLoggerCallback(),
        ModelWatchCallback(log_freq=4),
    ]
    trainer = PictureTrainer(tiny_config(directory, callbacks))
    trainer.fit()


def signalled(directory: Path, number: signal.Signals) -> None:
    """Send a signal to wandb-core and continue training."""
    services: set[int] = set()

    def send() -> None:
        services.update(running_services())
        for pid in services:
            os.kill(pid, number)

    config = tiny_config(directory, [logger(), AtStep(20, send)], n_epochs=100, max_steps=2000)
    config.num_samples = 400
    config.training_parameters.val_every_n_steps = 0
    trainer = TinyTrainer(config)
    log_dict = trainer.log_dict
    durations_s: list[float] = []

    def timed(*args: Any) -> None:
        began_s = time.perf_counter()
        log_dict(*args)
        if trainer.global_step > 20:
            durations_s.append(time.perf_counter() - began_s)

    trainer.log_dict = timed  # type: ignore[method-assign]  # to measure it
    began_s = time.perf_counter()
    trainer.fit()
    durations_s.sort()
    report(
        num_services=len(services),
        fit_s=time.perf_counter() - began_s,
        median_s=durations_s[len(durations_s) // 2],
        p99_s=durations_s[len(durations_s) * 99 // 100],
        slowest_s=durations_s[-1],
        left=len(services & running_services()),
    )


def frozen(directory: Path) -> None:
    signalled(directory, signal.SIGSTOP)


def killed(directory: Path) -> None:
    signalled(directory, signal.SIGKILL)


def unreachable(directory: Path) -> None:
    """A server that accepts the connection and never responds."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen(50)
    os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.getsockname()[1]}"
    os.environ["WANDB_API_KEY"] = "0" * 40
    began_s = time.perf_counter()
    started_s = 0.0

    def note() -> None:
        nonlocal started_s
        started_s = time.perf_counter() - began_s

    callbacks = [logger(mode="online", init_timeout_s=6), AtStep(1, note)]
    TinyTrainer(tiny_config(directory, callbacks, max_steps=3)).fit()
    report(started_s=started_s, fit_s=time.perf_counter() - began_s)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
