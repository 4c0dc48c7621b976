"""Part 9: the profile package on a GPU: step times, kernels in a trace, a memory snapshot."""

from __future__ import annotations

import gzip
import json
import pickle
import time
from typing import Any

import torch

from dream_callbacks.profile import BenchmarkCallback, MemorySnapshotCallback, ProfileCallback
from dream_callbacks.profile.step_times import CudaClock, HostClock, StepTimes
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from tools.gpu_parts.device_work import keep_busy
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import NetConfig, NetTrainer, net_config

STEP_MS = 20.0


def run(part: Part) -> None:
    """Check the clock, the benchmark, the trace and the snapshot."""
    with part.attempt("clock"):
        clock(part)
    with part.attempt("BenchmarkCallback"):
        benchmark(part)
    with part.attempt("trace"):
        trace(part)
    if part.needs_gpu("memory snapshot"):
        with part.attempt("memory snapshot"):
            snapshot(part)


def work(part: Part, ms: float) -> None:
    """Work of a known length: queued on the GPU, or done on the CPU."""
    if part.on_gpu:
        keep_busy(ms)
    else:
        time.sleep(ms / 1e3)


def clock(part: Part) -> None:
    """Marks measure the device's time, as the wall clock does around a sync."""
    times: StepTimes[Any] = StepTimes(CudaClock() if part.on_gpu else HostClock())
    work(part, 1.0)
    _wait(part)
    began_s = time.perf_counter()
    times.restart()
    work(part, 100.0)
    times.step(1)
    queued_s = time.perf_counter() - began_s
    _wait(part)
    wall_s = time.perf_counter() - began_s
    ((marked_s, _),) = times.take(wait=True)
    part.expect(
        "time between marks",
        abs(marked_s / wall_s - 1) < 0.05,
        {"marks, ms": marked_s * 1e3, "wall, ms": wall_s * 1e3},
        "the wall clock to 5 %",
    )
    if part.on_gpu:
        ms = queued_s * 1e3
        part.expect("setting marks doesn't wait", ms < 20, ms, "less than 20 ms with 100 ms queued")


class Works(NetTrainer):
    """Each step takes a known time on the device."""

    part: Part

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        work(self.part, STEP_MS)
        return result


class Wall(Callback[NetTrainer]):
    """Wall time of the steps after the skipped ones, to the end of their work on the device.

    Args:
        skip: Steps that aren't measured.
    """

    def __init__(self, skip: int) -> None:
        self.skip = skip

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.global_step == self.skip:
            self.began_s = self._now()

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.seconds = self._now() - self.began_s

    def _now(self) -> float:
        if self.trainer.world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def benchmark(part: Part) -> None:
    """The times of all steps add up to the wall time, most of which is the work."""
    callback, wall = BenchmarkCallback(skip=5), Wall(5)
    Works.part = part
    train(part, Works, "benchmark", [callback, wall], part.size(100, 20))
    result = callback.result
    assert result is not None
    total_s = result.num_steps * NetConfig.batch_size / result.samples_per_s
    part.expect(
        "BenchmarkCallback: time of all steps",
        abs(total_s / wall.seconds - 1) < 0.05 and result.median_s * 1e3 >= 0.95 * STEP_MS,
        {
            "seconds": total_s,
            "wall": wall.seconds,
            "median ms": result.median_s * 1e3,
            "peak MiB": result.peak_bytes / 2**20,
        },
        f"the wall time to 5 %, and a median of at least {STEP_MS:g} ms",
    )


def trace(part: Part) -> None:
    """The trace has kernels, or operators of the CPU."""
    callback = ProfileCallback()
    train(part, NetTrainer, "trace", [callback], 20)
    (path,) = callback.traces
    with gzip.open(path) as file:
        kinds = [event.get("cat") for event in json.load(file)["traceEvents"]]
    wanted = "kernel" if part.on_gpu else "cpu_op"
    found = {kind: kinds.count(kind) for kind in ("kernel", "gpu_memcpy", "cpu_op")}
    part.expect("events in the trace of 3 steps", found[wanted] > 30, found, f"{wanted} > 30")


def snapshot(part: Part) -> None:
    """The snapshot loads, and has allocations with their stacks."""
    callback = MemorySnapshotCallback(skip=1, num_steps=2)
    train(part, NetTrainer, "snapshot", [callback], 5)
    (path,) = (part.folder / "snapshot").rglob("*.pickle")
    found = pickle.loads(path.read_bytes())  # noqa: S301  # written just now
    entries = [entry for device in found["device_traces"] for entry in device]
    with_stack = [entry for entry in entries if entry.get("frames")]
    part.expect(
        "memory snapshot",
        bool(found["segments"]) and bool(with_stack),
        {"segments": len(found["segments"]), "events": len(entries), "stacks": len(with_stack)},
        "segments, and events with stacks",
    )


def train(
    part: Part, kind: type[NetTrainer], name: str, callbacks: list[Callback[Any]], steps: int
) -> None:
    """Train on the part's device."""
    device = DeviceParameters.SINGLE_DEVICE(device=part.device)
    config = net_config(
        part.folder / name, device, callbacks, training={"max_steps": steps}, num_batches=steps
    )
    kind(config).fit()


def _wait(part: Part) -> None:
    if part.on_gpu:
        torch.cuda.synchronize()
