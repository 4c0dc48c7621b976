"""Part 1: versions, and probes of what the packages rely on in torch, CUDA and NCCL."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from typing import Any

import torch
import torch.distributed as dist

from dream_callbacks.checkpoint.staging_memory import PinnedBlock
from dream_trainer.world import torch_private
from dream_trainer.world.faults.device_collectives import DeviceCollectives
from tools.gpu_parts.cases import rank_variables
from tools.gpu_parts.device_work import host_ms
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import has_library

BUSY_MS = 200.0
PROMPT_MS = 20.0
"""A call that doesn't wait for the device returns within this time."""


def run(part: Part) -> None:
    """Record versions; probe copies, pinned memory and NCCL."""
    part.measured("versions", versions())
    missing = [
        name
        for name in ("rich", "tensorboard", "wandb", "torchdata", "transformers", "tensordict")
        if not has_library(name)
    ]
    part.measured("optional libraries that aren't installed", ", ".join(missing) or "none")
    if not part.on_gpu:
        part.not_run("copies that don't wait", "no GPU")
        part.not_run("pinned memory of an exact size", "no GPU")
        part.not_run("the watchdog of NCCL, and an abort", "no GPU")
        with part.attempt("gloo has no collectives on a device"):
            found = gloo()
            part.expect("gloo has no collectives on a device", found == [], found, "none")
        return
    with part.attempt("copies that don't wait"):
        copies(part)
    with part.attempt("pinned memory of an exact size"):
        pinned(part)
    with part.attempt("the watchdog of NCCL, and an abort"):
        nccl(part)


def versions() -> dict[str, Any]:
    """Versions of all that matters, and the machine."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "Python": platform.python_version(),
        "CPUs": os.cpu_count(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "GPU": properties.name,
            "GPUs": torch.cuda.device_count(),
            "GiB": round(properties.total_memory / 2**30),
            "cuDNN": torch.backends.cudnn.version(),
            "driver": driver(),
        }
    if dist.is_nccl_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def driver() -> str:
    """Version of the NVIDIA driver."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()


def copies(part: Part) -> None:
    """Small copies of means, and batches from pinned memory, must not wait for the device."""
    device = torch.device("cuda")
    weights, batch = torch.ones(128, dtype=torch.float64), torch.ones(16 << 20)
    pinned_batch = batch.pin_memory()
    waiting = host_ms(lambda: weights.to(device), BUSY_MS)
    prompt = host_ms(lambda: weights.to(device, non_blocking=True), BUSY_MS)
    part.expect(
        "a small copy, blocking, waits for the device",
        waiting > BUSY_MS / 2,
        waiting,
        f"more than {BUSY_MS / 2:g} ms of host time with {BUSY_MS:g} ms queued",
    )
    within = f"at most {PROMPT_MS:g} ms of host time with {BUSY_MS:g} ms queued"
    part.expect("a small copy, non_blocking", prompt <= PROMPT_MS, prompt, within)
    ms = host_ms(lambda: pinned_batch.to(device, non_blocking=True), BUSY_MS)
    part.expect("64 MiB from pinned memory, non_blocking", ms <= PROMPT_MS, ms, within)
    part.measured(
        "64 MiB from pageable memory, non_blocking, ms",
        host_ms(lambda: batch.to(device, non_blocking=True), BUSY_MS),
    )


def pinned(part: Part) -> None:
    """Staging memory must be pinned with its exact size, not the next power of two."""
    num_bytes = (1 << 30) + 4096
    before, began_s = resident_bytes(), time.perf_counter()
    block = PinnedBlock(num_bytes)
    seconds, grown = time.perf_counter() - began_s, resident_bytes() - before
    whole = torch.frombuffer(block.memory, dtype=torch.uint8)
    is_pinned = whole.is_pinned()
    block.unpin()
    part.expect("the staging block is pinned", is_pinned, is_pinned, "is_pinned()")
    part.expect(
        "host memory of a pinned block of 1 GiB + 4 KiB",
        grown <= 1.02 * num_bytes,
        {"GiB": grown / 2**30, "seconds": seconds},
        "at most 2 % more than its size",
    )


def resident_bytes() -> int:
    """Memory of this process in RAM."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def nccl(part: Part) -> None:
    """The private names of torch's NCCL backend work, and an abort ends its collectives."""
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    os.environ.update(rank_variables())
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    backends = [
        (group, torch_private.nccl_error(backend))
        for group, backend in torch_private.nccl_backends()
    ]
    part.expect(
        "what the watchdog of NCCL says",
        backends == [("default_pg", "SUCCESS")],
        backends,
        "the default group, SUCCESS",
    )
    collectives, began_s = DeviceCollectives(0), time.perf_counter()
    for done in collectives.abort():
        done.result(20)
    seconds = time.perf_counter() - began_s
    part.expect("an abort of an idle group", seconds < 2, seconds, "less than 2 s")
    try:
        dist.all_reduce(ones)
        torch.cuda.synchronize()
    except dist.DistBackendError as error:
        found, raised = str(error).splitlines()[0], True
    else:
        found, raised = "nothing", False
    part.expect("a collective after the abort raises", raised, found, "DistBackendError")


def gloo() -> list[tuple[str, Any]]:
    """The NCCL backends of a gloo group."""
    os.environ.update(rank_variables())
    dist.init_process_group("gloo")
    try:
        return torch_private.nccl_backends()
    finally:
        dist.destroy_process_group()
