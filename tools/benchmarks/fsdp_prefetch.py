"""Gain of OptimizeFSDP on a network with latency, simulated on the CPU of one machine.

    python tools/benchmarks/fsdp_prefetch.py [--delay-ms 20] [--json FILE]

Two gloo ranks train a chain of sharded layers. Each all-gather is real and completes no
earlier than a fixed time after its start, as on a slow network: one that is started early enough
costs nothing. An ideal run waits only for the first gathers of forward and backward.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from dream_callbacks.fsdp import OptimizeFSDP
from dream_callbacks.profile import BenchmarkCallback
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

NUM_LAYERS = 8
NUM_STEPS = 14
NUM_SKIPPED = 4
DEPTHS = (0, 1, 2, 4)
GOAL = 1.5
"""How many times faster two layers ahead must be than none."""


# Renamed in torch 2.13.
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class LateWork(dist.distributed_c10d.Work):
    """An all-gather that completes no earlier than a given time."""

    def __init__(self, work: Any, end_s: float) -> None:
        super().__init__()
        self.work = work
        self.end_s = end_s

    def wait(self, timeout: Any = None) -> bool:
        if self.work is not None:
            self.work.wait()
        time.sleep(max(0.0, self.end_s - time.perf_counter()))
        return True


class LateAllGather:
    """Torch's own all-gather, `delay_s` later."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        end_s = time.perf_counter() + self.delay_s
        work = gather(output_tensor, input_tensor, group=group, async_op=async_op)
        late = LateWork(work, end_s)
        return late if async_op else (late.wait() and None)


class SlowNetwork(Callback):
    """Delays every all-gather of the model."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s

    def pre_fit(self) -> None:
        for model in self.trainer.named_models().values():
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_all_gather(LateAllGather(self.delay_s))


class Trainer(TinyTrainer):
    """A chain of layers, each sharded."""

    def configure_models(self) -> None:
        width = self.config.width
        self.model = nn.Sequential(nn.Linear(4, width))  # type: ignore[assignment]
        self.model.extend(nn.Linear(width, width) for _ in range(NUM_LAYERS))
        self.model.append(nn.Linear(width, 1))

    def apply_fully_shard(self, config: dict[str, Any]) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in self.model[1:-1]:
            fully_shard(layer, **config)
        fully_shard(self.model, **config)


def train(root_dir: str, depth: int, delay_s: float) -> float | None:
    """Median milliseconds of a step, on rank 0."""
    benchmark = BenchmarkCallback(skip=NUM_SKIPPED)
    callbacks: list[Callback] = [SlowNetwork(delay_s), benchmark]
    if depth:
        callbacks.append(OptimizeFSDP(depth))
    config = tiny_config(
        root_dir,
        callbacks,
        device=DeviceParameters.FSDP(device="cpu"),
        max_steps=NUM_STEPS,
        val_steps_per_epoch=0,
    )
    config.width = 128
    Trainer(config).fit()
    return benchmark.result and benchmark.result.median_s * 1e3


def measure(delay_s: float) -> dict[str, Any]:
    """Median milliseconds of a step, by depth of prefetching."""
    with tempfile.TemporaryDirectory() as root_dir:
        step_ms = {
            str(depth): run_on_ranks(train, 2, root_dir, depth, delay_s, timeout_s=300.0)[0]
            for depth in DEPTHS
        }
    return {
        "torch": torch.__version__,
        "delay_ms": delay_s * 1e3,
        "num_layers": NUM_LAYERS,
        "step_ms": step_ms,
        "gain_of_2": step_ms["0"] / step_ms["2"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay-ms", type=float, default=20.0, help="of each all-gather")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures = measure(options.delay_ms / 1e3)
    print(
        f"{NUM_LAYERS} layers, all-gathers {options.delay_ms:g} ms late, torch {torch.__version__}"
    )
    for depth, step_ms in figures["step_ms"].items():
        ahead = "no OptimizeFSDP" if depth == "0" else f"prefetch={depth}"
        print(f"  {ahead:<16}{step_ms:8.0f} ms per step")
    print(f"  prefetch=2 is {figures['gain_of_2']:.1f} times as fast as none; goal {GOAL}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + os.linesep)
    raise SystemExit(0 if figures["gain_of_2"] >= GOAL else 1)


if __name__ == "__main__":
    main()
