"""Second half of part 8: saves and loads of a large state, with an idle and a busy device."""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointCallback,
    CheckpointParameters,
)
from dream_trainer.callbacks import Callback, Every
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import tiny_config
from tools.benchmarks import checkpoint_save
from tools.gpu_parts.device_work import keep_busy
from tools.gpu_parts.part import Part
from tools.gpu_parts.versions import resident_bytes

BUSY_MS = 20.0
MAX_STALL_S, MAX_STALL_PER_GB_S = 0.1, 0.1


def run(part: Part) -> None:
    """Save and load a state of 2 GB, a third of it weights; 3 MB in a small run."""
    model_mb = part.size(700, 1)
    checkpoint_save.Large.num_layers = max(model_mb // 4, 1)
    checkpoint_save.Large.num_rows = min(model_mb * 256, 1024)
    device = DeviceParameters.SINGLE_DEVICE(device=part.device)
    with part.attempt("synchronous save and load"):
        sync(part, device)
    for name, is_busy in (("idle", False), ("with a busy device", True)):
        with part.attempt(f"asynchronous save, {name}"):
            asynchronous(part, device, name, is_busy=is_busy)


def sync(part: Part, device: DeviceParameters) -> None:
    """Time of a save and a load, compared with a plain write of as many bytes."""
    trainer = checkpoint_save.trained(part.folder / "plain", [], device=device)
    size = state_bytes(trainer)
    data = memoryview(bytearray(os.urandom(1 << 20)) * max(size >> 20, 1))
    write_s = checkpoint_save.written(part.folder, data, direct=False)
    (part.folder / "raw").unlink()
    save_s = min(checkpoint_save.sync_save(part.folder, trainer) for _ in range(2))
    root = part.folder / "load"
    checkpoint_save.trained(root, [CheckpointCallback()], device=device)
    plain_s = checkpoint_save.timed(lambda: set_up(part.folder / "none", device))
    load_s = checkpoint_save.timed(lambda: set_up(root, device)) - plain_s
    gigabytes = size / 1e9
    found = {
        "GB": gigabytes,
        "write and fsync, GB/s": gigabytes / write_s,
        "save, GB/s": gigabytes / save_s,
        "verify and load, GB/s": gigabytes / load_s,
    }
    if part.is_small:
        part.measured("synchronous save and load", found)
    else:
        expected = "a save takes at most twice as long as a write of as many bytes to one file"
        part.expect("synchronous save and load", save_s <= 2 * write_s, found, expected)


def set_up(root: Path, device: DeviceParameters) -> None:
    """Set up a trainer, which loads a checkpoint if there is one."""
    config = tiny_config(root, [CheckpointCallback()], device=device, max_steps=1)
    checkpoint_save.Large(config).setup()


def state_bytes(trainer: checkpoint_save.Large) -> int:
    """Bytes of weights and optimizer state."""
    state = trainer.state_dict()
    return sum(checkpoint_save.num_bytes(state[key]) for key in ("models", "optimizers"))


class Watches(Callback[checkpoint_save.Large]):
    """Seconds from each save to its commit, and memory; optionally keeps the device busy.

    Args:
        is_busy: Queue work in each step, and don't wait for a save.
    """

    before = {Callback}

    def __init__(self, *, is_busy: bool) -> None:
        self.is_busy = is_busy
        self.save_s: list[float] = []
        self.num_steps = 0
        self.resident_before = 0
        self.resident = 0
        self._thread: threading.Thread | None = None
        self._began_s = 0.0

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 1:
            self.resident_before = resident_bytes()
        saving = [t for t in threading.enumerate() if t.name == "checkpoint"]
        if saving and saving[0] is not self._thread:
            self._thread, self._began_s = saving[0], time.perf_counter()
            self.resident = max(self.resident, resident_bytes())
            if not self.is_busy:
                self._thread.join()
        if self._thread is not None and not self._thread.is_alive() and self._began_s:
            self.save_s.append(time.perf_counter() - self._began_s)
            self._began_s = 0.0
        if self.is_busy:
            self.num_steps += 1
            if self.trainer.world.device.type == "cuda":
                keep_busy(BUSY_MS)
                if batch_idx % 4 == 0:  # the host isn't far ahead of the device
                    torch.cuda.synchronize()
            else:
                time.sleep(BUSY_MS / 1e3)


class Stalls(checkpoint_save.Waited):
    """Seconds that training waited for each save."""

    def __init__(self) -> None:
        super().__init__()
        self.stalls_s: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        if "training waited" in str(record.msg):
            self.stalls_s.append(self.seconds)


def asynchronous(part: Part, device: DeviceParameters, name: str, *, is_busy: bool) -> None:
    """Two saves: the first pins memory, the second is measured."""
    watches, stalls = Watches(is_busy=is_busy), Stalls()
    logger = logging.getLogger("dream_callbacks.checkpoint")
    logger.addHandler(stalls)
    logger.setLevel(logging.DEBUG)
    every = part.size(200, 20) if is_busy else 2
    parameters = CheckpointParameters(every=Every(steps=every), keep_last=1)
    try:
        trainer = checkpoint_save.trained(
            part.folder / name,
            [AsyncCheckpointCallback(parameters), watches],
            max_steps=2 * every + (every - 1),
            device=device,
        )
    finally:
        logger.removeHandler(stalls)
    size = state_bytes(trainer)
    warm_s = stalls.stalls_s[1]
    found = {
        "GB": size / 1e9,
        "stall, s": warm_s,
        "first stall, s": stalls.stalls_s[0],
        "until committed, s": watches.save_s[-1] if watches.save_s else float("nan"),
        "host memory, GB": (watches.resident - watches.resident_before) / 1e9,
    }
    if part.is_small:
        part.measured(f"asynchronous save, {name}", found)
        return
    limit_s = MAX_STALL_S + MAX_STALL_PER_GB_S * size / 1e9 + (4 * BUSY_MS / 1e3) * is_busy
    part.expect(
        f"asynchronous save, {name}: training waits",
        warm_s <= limit_s,
        found,
        f"at most {limit_s:.2f} s",
    )
    grown = watches.resident - watches.resident_before
    part.expect(
        f"asynchronous save, {name}: host memory",
        grown <= 1.1 * size,
        {"GB": grown / 1e9, "state": size / 1e9},
        "at most 10 % more than the state",
    )
