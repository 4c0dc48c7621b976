"""Part 5: how a rank on NCCL ends after a failure: last line, exit code, clean-up, seconds."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from dream_callbacks.checkpoint import CheckpointCallback
from dream_callbacks.profile import MemorySnapshotCallback
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.world import World
from tools.gpu_parts.cases import Case, Outcome, free_port, rank_variables, run_cases
from tools.gpu_parts.device_work import cycles_per_ms, keep_busy
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import NetTrainer, OneRankWorld, net_config

TIMEOUT_S = 60.0
TRAIN_TIMEOUT_S = 5.0
KERNEL_MS = 15_000.0
MAX_LEFT_MIB = 64
AT_STEP = 3
_LOG_OF_TORCH = re.compile(r"\[rank\d+\]:\[[EWI]\d|\[[EWI]\d")


@dataclasses.dataclass(frozen=True)
class Expected:
    """What is expected of a failure.

    Args:
        code: Exit code.
        last_line: Regular expression, for the last line that isn't torch's C++ log. None: any.
        cleans_up: Whether `on_exception` runs.
        seconds: Longest time from the failure to the end of the process.
        needs: "GPU" or "two GPUs"; else it is run on the CPU too.
    """

    code: int
    last_line: str | None
    cleans_up: bool
    seconds: float
    needs: Literal["GPU", "two GPUs"] | None = None


TIMED_OUT = (
    r"an NCCL collective timed out \(group .+; flight recorder: .*trace_0; where each rank was"
)
EXPECTED = {
    "index out of range": Expected(1, r"failed in .*(device-side assert|IndexError)", True, 10),
    "out of memory": Expected(1, r"failed in .*OutOfMemoryError", True, 10, "GPU"),
    "NaN": Expected(1, r"FloatingPointError", True, 10),
    "SIGTERM": Expected(-signal.SIGTERM, None, False, 10),
    "os._exit": Expected(7, None, False, 5),
    # The kernel can't be aborted, but the all-reduce behind it is no longer waited for.
    "NCCL timeout, main thread in Python": Expected(1, TIMED_OUT, True, 15, "GPU"),
    "NCCL timeout, main thread in .item()": Expected(1, TIMED_OUT, False, 16, "GPU"),
    "two ranks, rank 0": Expected(1, r"rank 1 .*ZeroDivisionError: planned", True, 10, "two GPUs"),
    "two ranks, rank 1": Expected(1, r"rank 1 .*ZeroDivisionError: planned", True, 10, "two GPUs"),
}


def run(part: Part) -> None:
    """Let each failure happen in its own process, all at the same time."""
    num_gpus = torch.cuda.device_count() if part.on_gpu else 0
    available = {None: True, "GPU": num_gpus > 0, "two GPUs": num_gpus > 1}
    used_before = used_mib(part)
    cases, port = {}, free_port()
    for name, expected in EXPECTED.items():
        if not available[expected.needs]:
            part.not_run(name, f"needs {'a GPU' if expected.needs == 'GPU' else expected.needs}")
            continue
        folder = part.folder / f"of {name}"
        folder.mkdir()
        pair = re.search(r"two ranks, rank (\d)", name)
        variables = rank_variables(int(pair[1]), 2, port) if pair else rank_variables()
        cases[name] = Case(
            "failures:fail",
            {"kind": name, "folder": str(folder), "device": part.device},
            {**variables, "TORCH_FR_DUMP_TEMP_FILE": str(folder / "trace_")},
        )
    outcomes = run_cases(cases, part.folder, TIMEOUT_S)
    for name, outcome in outcomes.items():
        with part.attempt(name):
            check(part, name, outcome, part.folder / f"of {name}")
    if part.needs_gpu("memory of the GPU afterwards"):
        left = used_mib(part) - used_before
        part.expect(
            "memory of the GPU afterwards", left <= MAX_LEFT_MIB, left, f"≤ {MAX_LEFT_MIB} MiB more"
        )


def check(part: Part, name: str, outcome: Outcome, folder: Path) -> None:
    """Compare with what is expected."""
    expected = EXPECTED[name]
    lines = [line for line in outcome.output.splitlines() if line.strip()]
    own = next((line for line in reversed(lines) if not _LOG_OF_TORCH.match(line)), "")
    failed_at_s = float((folder / "failed_at").read_text())
    cleaned_up = (folder / "on_exception").exists()
    seconds = outcome.ended_at_s - failed_at_s
    is_said = expected.last_line is None or re.search(expected.last_line, own) is not None
    found = {"code": outcome.code, "on_exception": cleaned_up, "seconds": seconds, "last line": own}
    part.expect(
        name,
        outcome.code == expected.code
        and cleaned_up == expected.cleans_up
        and seconds <= expected.seconds
        and is_said,
        found,
        f"code {expected.code}, on_exception {expected.cleans_up}, at most {expected.seconds} s, "
        f"last line {expected.last_line or 'any'}",
    )
    if outcome.output and lines[-1] != own:
        part.measured(f"{name}: torch's log after the last line", lines[-1])
    if name == "out of memory":
        files = [path.name for path in folder.rglob("*.out_of_memory.pickle")]
        part.expect("out of memory: snapshot", len(files) == 1, files, "one file")
    if name == "SIGTERM":
        saved = sorted(path.name for path in folder.rglob("checkpoints/step*"))
        part.expect("SIGTERM: checkpoint", len(saved) == 1, saved, "that of the last step")


def used_mib(part: Part) -> int:
    """Memory of the GPU that all processes use."""
    if not part.on_gpu:
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return (total - free) >> 20


# In the process of a case


class CleansUp(Callback[NetTrainer]):
    """Leaves a file when it cleans up after an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, exception: BaseException) -> None:
        (self.folder / "on_exception").write_text(type(exception).__name__)


class Fails(NetTrainer):
    """Fails in a step, in one way."""

    kind = ""
    folder = Path()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        if self.global_step == AT_STEP - 1:
            (self.folder / "failed_at").write_text(str(time.time()))
            self._fail(result["loss"])
        return result

    def _fail(self, loss: Tensor) -> None:
        device = self.world.device
        if self.kind == "index out of range":
            values = torch.zeros(4, device=device)
            values[torch.tensor([9]).to(device)] += 1.0
        elif self.kind == "out of memory":
            torch.empty(1 << 50, device=device)
        elif self.kind == "NaN":
            with torch.no_grad():
                self.model.head.weight.fill_(float("nan"))
        elif self.kind == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "os._exit":
            os._exit(7)
        elif self.kind.startswith("NCCL timeout"):
            self._time_out(torch.ones(1, device=device))
        elif self.kind == "two ranks, rank 0":
            ones = torch.ones(1, device=device)
            dist.all_reduce(ones)
            ones.item()
        elif self.kind == "two ranks, rank 1":
            time.sleep(1)
            raise ZeroDivisionError("planned")

    def _time_out(self, ones: Tensor) -> None:
        keep_busy(KERNEL_MS)
        dist.all_reduce(ones)
        if self.kind.endswith(".item()"):
            ones.item()
        while True:
            time.sleep(0.01)


def fail(kind: str, folder: str, device: Literal["cpu", "cuda"]) -> None:
    """Train until the failure."""
    own = Path(folder)
    Fails.kind, Fails.folder = kind, own
    callbacks: list[Callback[Any]] = [CleansUp(own)]
    if kind == "out of memory":
        callbacks.append(MemorySnapshotCallback(skip=0, num_steps=None))
    if kind == "SIGTERM":
        callbacks.append(CheckpointCallback())
    if device == "cuda":
        cycles_per_ms()
    parameters = DeviceParameters(
        device=device, init_timeout_s=60, train_timeout_s=TRAIN_TIMEOUT_S, cleanup_timeout_s=5
    )
    is_pair = kind.startswith("two ranks")
    world = World(parameters) if is_pair else OneRankWorld(parameters, shards=False)
    config = net_config(own, parameters, callbacks, num_batches=10)
    Fails(config, world=world).fit()
