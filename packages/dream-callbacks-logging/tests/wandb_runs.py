"""Runs with W&B, each in a process of its own: `python wandb_runs.py NAME DIRECTORY`."""

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
    WandBLoggerMixin,
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


class MixinTrainer(TinyTrainer, WandBLoggerMixin):
    pass


class AtStep(Callback[Any]):
    """Calls a function at a step."""

    def __init__(self, step: int, function: Any) -> None:
        self.step = step
        self.function = function

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step == self.step:
            self.function()


def report(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def logger(**options: Any) -> LoggerCallback:
    return LoggerCallback(sinks=[JSONLinesSink(), WandBSink(**{"mode": "offline", **options})])


def offline(directory: Path) -> None:
    callbacks = [
        logger(tags=["tiny"], notes="a note"),
        LRLoggerCallback(),
        MediaLoggerCallback(),
        ModelWatchCallback(log_freq=4),
    ]
    trainer = PictureTrainer(tiny_config(directory, callbacks))
    trainer.fit()


def resumed(directory: Path) -> None:
    """Train 5 steps, keep the state of the third, and go on from there."""
    states: list[Any] = []
    keep = AtStep(3, lambda: states.append(trainer.state_dict()))
    trainer = TinyTrainer(tiny_config(directory, [logger(), keep], max_steps=5))
    trainer.fit()
    torch.save(states[0], directory / "state.pt")


def resume(directory: Path) -> None:
    trainer = TinyTrainer(tiny_config(directory, [logger()], max_steps=8))
    trainer.setup()
    trainer.load_state_dict(torch.load(directory / "state.pt", weights_only=False))
    trainer.fit()


def signalled(directory: Path, number: signal.Signals) -> None:
    """Send a signal to wandb-core and go on training."""
    services: set[int] = set()

    def send() -> None:
        services.update(running_services())
        for pid in services:
            os.kill(pid, number)

    trainer = TinyTrainer(
        tiny_config(directory, [logger(), AtStep(20, send)], num_samples=20_000, max_steps=2000)
    )
    log_dict, slowest_s = trainer.log_dict, 0.0

    def timed(*args: Any) -> None:
        nonlocal slowest_s
        began_s = time.perf_counter()
        log_dict(*args)
        if trainer.global_step > 20:
            slowest_s = max(slowest_s, time.perf_counter() - began_s)

    trainer.log_dict = timed  # type: ignore[method-assign]  # to measure it
    began_s = time.perf_counter()
    trainer.fit()
    report(
        num_services=len(services),
        fit_s=time.perf_counter() - began_s,
        slowest_s=slowest_s,
        left=len(services & running_services()),
    )


def frozen(directory: Path) -> None:
    signalled(directory, signal.SIGSTOP)


def killed(directory: Path) -> None:
    signalled(directory, signal.SIGKILL)


def killed_then_again(directory: Path) -> None:
    def kill() -> None:
        for pid in running_services():
            os.kill(pid, signal.SIGKILL)

    trainer = TinyTrainer(tiny_config(directory, [logger(), AtStep(2, kill)], max_steps=4))
    trainer.fit()
    trainer.config.training_parameters.max_steps = 7
    trainer.fit()


def without_key(directory: Path) -> None:
    TinyTrainer(tiny_config(directory, [logger(mode="online")], max_steps=3)).fit()


def unreachable(directory: Path) -> None:
    """A server that takes the connection and never says a word."""
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


def own_run(directory: Path) -> None:
    """A script that has started its run itself."""
    import wandb

    settings = wandb.Settings(silent=True, console="off")
    directory.mkdir(parents=True, exist_ok=True)
    run = wandb.init(mode="offline", dir=str(directory), settings=settings)
    TinyTrainer(tiny_config(directory, [logger()], max_steps=3)).fit()
    run.log({"mine": 1.0})
    run.finish()


def mixin(directory: Path) -> None:
    ids: list[Any] = []
    callback = AtStep(1, lambda: ids.append(trainer.wandb_run.id))
    os.environ.setdefault("WANDB_MODE", "offline")
    trainer = MixinTrainer(tiny_config(directory, [LoggerCallback(), callback], max_steps=3))
    trainer.fit()
    report(during=ids[0], after=trainer.wandb_run)


def failing(directory: Path) -> None:
    def fail() -> None:
        raise ValueError("no luck")

    TinyTrainer(tiny_config(directory, [logger(), AtStep(2, fail)])).fit()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
