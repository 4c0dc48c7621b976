"""Time of a checkpoint, compared with the disk and with DCP's ways of saving.

    python tools/benchmarks/checkpoint_save.py [--model-mb 100] [--folder DIR] [--json FILE]

A model of this size and its Adam state are saved in turns with each of:

- write: the same bytes from memory to one file, synced
- write, direct: past the page cache, in blocks of 2 MB (O_DIRECT); the speed of the disk
- dcp.save: DCP's defaults; nothing is verified, nothing is committed
- CheckpointCallback: written, checksummed, synced, committed by a rename
- dcp.async_save: DCP's fastest way on a CPU: a reused stager, and a thread or a process with shared
  memory; the time that it blocks
- AsyncCheckpointCallback: the time that training waits

Each round starts with another one, so that other load slows all of them. Figures are medians over
the rounds, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointParameters,
)
from dream_trainer.callbacks import Callback, Every
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config

SYNC_GOAL = 0.9
"""Part of the disk's speed that CheckpointCallback must reach."""

COMMIT_GOAL = 1.25
"""How much longer than dcp.save it may take, from 100 MB on; below, 25 ms longer."""


class Large(TinyTrainer):
    """A model of layers of 4 MB, or of one smaller layer, trained for one step."""

    num_layers = 1
    num_rows = 1024

    def configure_models(self) -> None:
        super().configure_models()
        for number in range(self.num_layers):
            self.model.register_parameter(
                f"p{number}", nn.Parameter(torch.randn(self.num_rows, 1024))
            )

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        for name, parameter in self.model.named_parameters():
            if name.startswith("p") and parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        return super().training_step(batch, batch_idx)


def trained(
    folder: Path,
    callbacks: Iterable[Callback[Any]],
    max_steps: int = 1,
    *,
    device: DeviceParameters | None = None,
) -> Large:
    trainer = Large(tiny_config(folder, callbacks, device=device, max_steps=max_steps))
    trainer.fit()
    return trainer


def num_bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state
    return sum(map(num_bytes, values)) if isinstance(state, (dict, list, tuple)) else 0


def timed(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def written(folder: Path, data: memoryview, *, direct: bool) -> float:
    """Seconds to write a new file of these bytes, a multiple of 1 MB."""
    block = mmap.mmap(-1, 1 << 21)  # O_DIRECT needs page-aligned memory
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)

    def write() -> None:
        file = os.open(folder / "raw", flags)
        for start in range(0, len(data), len(block)):
            piece = data[start : start + len(block)]
            if direct:
                block[: len(piece)] = piece
                piece = memoryview(block)[: len(piece)]
            os.write(file, piece)
        os.fsync(file)
        os.close(file)

    (folder / "raw").unlink(missing_ok=True)
    return timed(write)


class Waited(logging.Handler):
    """Seconds that training waited for the last save, as logged by AsyncCheckpointCallback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seconds = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if "training waited" in str(record.msg):
            assert isinstance(record.args, tuple)
            self.seconds = float(record.args[1])  # type: ignore[arg-type]


def measure(model_mb: int, folder: Path, rounds: int) -> dict[str, Any]:
    Large.num_layers = max(model_mb // 4, 1)
    Large.num_rows = min(model_mb * 256, 1024)
    parameters = CheckpointParameters(every=Every(steps=1), keep_last=1)
    plain = trained(folder / "plain", [])
    state = {key: plain.state_dict()[key] for key in ("models", "optimizers")}
    size = num_bytes(state)
    data = memoryview(bytearray(os.urandom(1 << 20)) * (size >> 20))
    seconds: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        seconds.setdefault(name, []).append(value)

    def dcp_save() -> float:
        shutil.rmtree(folder / "dcp", ignore_errors=True)
        return timed(lambda: dcp.save(state, checkpoint_id=folder / "dcp"))

    ways: list[tuple[str, Callable[[], float]]] = [
        ("write", lambda: written(folder, data, direct=False)),
        ("write, direct", lambda: written(folder, data, direct=True)),
        ("dcp.save", dcp_save),
        ("CheckpointCallback", lambda: sync_save(folder, plain)),
    ]
    for round_ in range(rounds):
        first = round_ % len(ways)
        for name, save in (*ways[first:], *ways[:first]):
            note(name, save())
    (folder / "raw").unlink()
    note_async(folder, plain, parameters, rounds, note)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"bytes": size, "seconds": medians, "all": seconds}


def ratio(found: dict[str, Any], one: str, other: str) -> float:
    """Median over the rounds of the ratio of two ways."""
    pairs = zip(found["all"][one], found["all"][other], strict=True)
    median: float = statistics.median(a / b for a, b in pairs)
    return median


def sync_save(folder: Path, trainer: Large) -> float:
    """Seconds of one save by the callback, without the step before it."""
    from dream_callbacks.checkpoint.manager import CheckpointManager
    from dream_callbacks.checkpoint.retention import KeepRules

    shutil.rmtree(folder / "sync", ignore_errors=True)
    manager = CheckpointManager(folder / "sync", trainer.world, KeepRules(last=1))
    manager.open()

    def save() -> None:
        pending = manager.prepare(
            trainer.state_dict,
            step=1,
            epoch=0,
            reason="benchmark",
            num_train_batches=None,
            metrics={},
        )
        manager.write(pending)

    try:
        return timed(save)
    finally:
        manager.close()


def note_async(
    folder: Path,
    plain: Large,
    parameters: CheckpointParameters,
    rounds: int,
    note: Callable[[str, float], None],
) -> None:
    """Blocked seconds of DCP's fastest ways on a CPU and of AsyncCheckpointCallback, in turns."""
    import torch.distributed as dist
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    waited = Waited()
    logger = logging.getLogger("dream_callbacks.checkpoint")
    logger.addHandler(waited)
    logger.setLevel(logging.DEBUG)
    state = {key: plain.state_dict()[key] for key in ("models", "optimizers")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    thread, process = AsyncCheckpointerType.THREAD, AsyncCheckpointerType.PROCESS
    stagers = {
        way: DefaultStager(StagingOptions(False, way is process, False, False))
        for way in (thread, process)
    }

    class Turn(Callback[Any]):
        """Before each step: wait for our save, let DCP make one, and wait for that."""

        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            ours_s = waited.seconds
            is_warm = self.trainer.global_step > 1  # the first one allocates its memory
            for way, stager in stagers.items():
                shutil.rmtree(folder / "dcp", ignore_errors=True)
                began_s = time.perf_counter()
                future: Any = dcp.async_save(
                    state,
                    checkpoint_id=folder / "dcp",
                    async_stager=stager,
                    async_checkpointer_type=way,
                )
                blocked_s = time.perf_counter() - began_s
                getattr(future, "upload_completion", future).result()
                if is_warm:
                    note(f"dcp.async_save, {way.value}", blocked_s)
            if is_warm:
                note("AsyncCheckpointCallback", ours_s)

    trained(folder / "async", [AsyncCheckpointCallback(parameters), Turn()], rounds + 2)
    for stager in stagers.values():
        stager.close()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-mb", type=int, default=100)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.model_mb, Path(folder), options.rounds)
    seconds, megabytes = found["seconds"], found["bytes"] / 1e6
    print(f"{megabytes:.0f} MB of weights and Adam state, {os.cpu_count()} CPUs")
    for name, value in seconds.items():
        print(f"{name:<25} {value:7.3f} s  {megabytes / value:6.0f} MB/s")
    for way in ("write", "write, direct"):
        speed = ratio(found, way, "CheckpointCallback")
        of_way = f"{speed:.0%} of the speed of {way}"
        print(f"CheckpointCallback reaches {of_way}; goal: {SYNC_GOAL:.0%}")
    longer = ratio(found, "CheckpointCallback", "dcp.save")
    more_ms = 1000 * (seconds["CheckpointCallback"] - seconds["dcp.save"])
    goal = f"{COMMIT_GOAL} times" if megabytes >= 100 else "25 ms"
    print(f"it takes {longer:.2f} times as long as dcp.save, {more_ms:+.0f} ms; goal: {goal}")
    for way in ("thread", "process"):
        blocked = ratio(found, "AsyncCheckpointCallback", f"dcp.async_save, {way}")
        print(f"training waits {blocked:.2f} times as long as with DCP's {way}; goal: 1.00")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
