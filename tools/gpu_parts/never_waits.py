"""Part 3: steps that don't log, validate or save never wait for the device, with every callback."""

from __future__ import annotations

from typing import Any

import torch

from dream_callbacks.checkpoint import CheckpointCallback, CheckpointParameters
from dream_callbacks.logging import (
    JSONLinesSink,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    ModelWatchCallback,
    TensorBoardSink,
)
from dream_callbacks.profile import (
    BenchmarkCallback,
    FindGraphBreaksCallback,
    FindHostSyncsCallback,
    ProfileCallback,
)
from dream_trainer.callbacks import Callback, Every
from dream_trainer.configs import DeviceParameters
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import NetTrainer, has_library, net_config

EVERY = 50
PLANTED = 7


class Validates(NetTrainer):
    """Reports two values per batch, and validates."""

    def configure_dataloaders(self) -> Any:
        loader = super().configure_dataloaders()
        return loader, loader

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        return {**result, "perplexity": result["loss"].detach().exp()}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        return {"val_loss": (self.model(x).float() - y).square().mean()}


class RefusesWaiting(Callback[NetTrainer]):
    """Makes CUDA raise where a step waits for the device that has no reason to.

    Args:
        every: Steps that are multiples of this log, validate or save.
    """

    before = {Callback}

    def __init__(self, every: int) -> None:
        self.every = every

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step + 1
        torch.cuda.set_sync_debug_mode(
            "default" if step == 1 or step % self.every == 0 else "error"
        )

    def pre_validation_epoch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def pre_epoch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def post_fit(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


class Waits(Callback[NetTrainer]):
    """Reads the loss on the host in some steps."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step % PLANTED == 0:
            result["loss"].item()


def every_callback() -> list[Callback[Any]]:
    """The callbacks of all packages, as far as their libraries are installed."""
    sinks: list[Any] = [JSONLinesSink()]
    if has_library("tensorboard"):
        sinks.append(TensorBoardSink())
    callbacks: list[Callback[Any]] = [
        LoggerCallback(EVERY, sinks=sinks),
        LRLoggerCallback(),
        MetricLoggerCallback(),
        MediaLoggerCallback(),
        ModelWatchCallback(log="all", log_freq=EVERY),
        BenchmarkCallback(every=Every(steps=EVERY)),
        FindGraphBreaksCallback(),
        ProfileCallback(),
        CheckpointCallback(CheckpointParameters(every=Every(steps=EVERY))),
    ]
    if has_library("rich"):
        from dream_callbacks.summary import ModelSummary, ProgressBar, TrainerSummary

        callbacks = [TrainerSummary(), ModelSummary(), ProgressBar(), *callbacks]
    return callbacks


def run(part: Part) -> None:
    """Train 300 steps with every callback; find syncs that were planted."""
    for name in ("rich", "tensorboard"):
        if not has_library(name):
            part.not_run(f"callbacks that need {name}", f"{name} isn't installed")
    steps = part.size(6 * EVERY, 2 * EVERY)
    callbacks = every_callback()
    name = f"{steps} steps with {len(callbacks)} callbacks"
    if part.on_gpu:
        with part.attempt(name):
            train(part, "all", [RefusesWaiting(EVERY), *callbacks], steps)
            part.expect(name, True, "no wait", "no wait except in steps that log, validate or save")
        with part.attempt("the check sees a wait"):
            try:
                train(part, "control", [RefusesWaiting(EVERY), Waits()], 2 * PLANTED)
            except RuntimeError as error:
                text = str(error).splitlines()[0]
                part.expect("the check sees a wait", "synchronizing" in text, text, "an error")
            else:
                part.expect("the check sees a wait", False, "no error", "an error")
    else:
        part.not_run(f"{name} under set_sync_debug_mode", "no GPU")
    with part.attempt("FindHostSyncsCallback"):
        finds = FindHostSyncsCallback(num_steps=3 * PLANTED, skip=3)
        train(part, "planted", [finds, Waits()], 4 * PLANTED)
        found = [step for step, syncs in finds.syncs.items() if syncs]
        places = {sync.place for syncs in finds.syncs.values() for sync in syncs}
        wanted = [PLANTED, 2 * PLANTED, 3 * PLANTED]
        is_line = all('result["loss"].item()' in place for place in places)
        part.expect("planted syncs are found", found == wanted, found, f"steps {wanted}")
        part.expect("their line is named", bool(places) and is_line, sorted(places), "that line")
    with part.attempt("FindHostSyncsCallback without syncs"):
        finds = FindHostSyncsCallback(num_steps=10, skip=3)
        train(part, "none", [finds], 20)
        found = [step for step, syncs in finds.syncs.items() if syncs]
        part.expect("no sync is found where there is none", found == [], found, "none")


def train(part: Part, name: str, callbacks: list[Callback[Any]], steps: int) -> None:
    """Train on the part's device."""
    config = net_config(
        part.folder / name,
        DeviceParameters.SINGLE_DEVICE(device=part.device),
        callbacks,
        training={
            "max_steps": steps,
            "val_every_n_steps": min(EVERY, steps),
            "gradient_clip_val": 1.0,
        },
        num_batches=400,
    )
    Validates(config).fit()
