"""Part 2: one rank on NCCL takes the paths of several; its losses are those of the CPU."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import torch

from dream_callbacks.fsdp import OptimizeFSDP
from dream_trainer.configs import DeviceParameters
from tools.gpu_parts.cases import Case, Outcome, rank_variables, run_cases
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import (
    Losses,
    NetTrainer,
    OneRankWorld,
    largest_difference,
    net_config,
)

TOLERANCE, TOLERANCE_BF16 = 1e-4, 3e-2
TIMEOUT_S = 75.0

VARIANTS: dict[str, dict[str, Any]] = {
    "FSDP2": {},
    "cpu_offload, with buffers": {"cpu_offload": True},
    "bf16": {"param_dtype": "bfloat16", "reduce_dtype": "float32"},
    "compile": {"compile_model": True},
    "accumulation": {"accumulate": 4},
    "accumulation, reduced with every batch": {"accumulate": 4, "reduce_every_batch": True},
    "deterministic": {"deterministic": True, "times": 2},
}
ON_GPU_ONLY = {"cpu_offload, with buffers", "compile"}
"""Not on the CPU: offloading is nothing there, and compiling takes long."""


def run(part: Part) -> None:
    """Train each variant in its own process, all at the same time, and once on the CPU."""
    width, steps = part.size(512, 32), part.size(20, 6)
    sizes = {"width": width, "steps": steps}
    cases = {}
    for name, options in VARIANTS.items():
        if name in ON_GPU_ONLY and part.is_small:
            part.not_run(name, "small sizes" if part.on_gpu else "no GPU")
            continue
        arguments = {**sizes, **options, "device": part.device}
        cases[name] = Case("one_rank:trained", arguments, rank_variables())
    for accumulate in (1, 4):
        alone = {**sizes, "device": "cpu", "accumulate": accumulate, "alone": True}
        cases[f"CPU, {accumulate}"] = Case("one_rank:trained", alone)
    outcomes = run_cases(cases, part.folder, TIMEOUT_S)
    references = {n: outcomes.pop(f"CPU, {n}").value()["losses"][0] for n in (1, 4)}
    for name, outcome in outcomes.items():
        with part.attempt(name):
            wanted = references[VARIANTS[name].get("accumulate", 1)]
            check(part, name, outcome, wanted, TOLERANCE_BF16 if name == "bf16" else TOLERANCE)
    with part.attempt("memory of gradients"):
        memory(part, outcomes)


def check(part: Part, name: str, outcome: Outcome, wanted: list[float], tolerance: float) -> None:
    """Compare the losses of a variant; and what else it promises."""
    found = outcome.value()
    difference = largest_difference(found["losses"][0], wanted)
    part.expect(
        f"{name}: losses",
        difference <= tolerance,
        {"largest relative difference": difference, "seconds": outcome.seconds},
        f"those of the CPU in float32 to {tolerance:g}",
    )
    if "deterministic" in name:
        first, second = found["losses"]
        part.expect("deterministic: two runs", first == second, first == second, "bit for bit")
    if "offload" in name:
        places = [found["parameters"], found["buffers"]]
        is_right = places == [["cpu"], ["cuda"]]
        part.expect(f"{name}: devices", is_right, places, "parameters cpu, buffers cuda")


def memory(part: Part, outcomes: dict[str, Outcome]) -> None:
    """With one rank a shard is everything, so the two ways of reducing need about the same."""
    if not part.needs_gpu("memory of gradients"):
        return
    whole, each = (
        outcomes[name].value()["peak"]
        for name in ("accumulation", "accumulation, reduced with every batch")
    )
    part.expect(
        "peak memory with reduce_every_batch",
        each <= 1.1 * whole,
        {"MiB": each / 2**20, "without, MiB": whole / 2**20},
        "at most 10 % more than without it, on one rank",
    )


def trained(
    *,
    device: Literal["cpu", "cuda"],
    width: int,
    steps: int,
    accumulate: int = 1,
    times: int = 1,
    alone: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train in this process, and return losses, places and peak memory.

    Args:
        device: Where to.
        width: Of the model.
        steps: Optimizer steps.
        accumulate: Batches of a step.
        times: Number of runs, one after the other.
        alone: Without a process group and without sharding.
        **options: Fields of DeviceParameters; dtypes by name.
    """
    for name in ("param_dtype", "reduce_dtype"):
        if name in options:
            options[name] = getattr(torch, options[name])
    losses = []
    for _ in range(times):
        preset = DeviceParameters.SINGLE_DEVICE if alone else DeviceParameters.FSDP
        parameters = preset(device=device, **options)
        kept = Losses()
        with tempfile.TemporaryDirectory() as root:
            config = net_config(
                root,
                parameters,
                [kept] if alone else [OptimizeFSDP(), kept],
                training={
                    "max_steps": steps,
                    "gradient_accumulation_steps": accumulate,
                    "gradient_clip_val": 1.0,
                },
                width=width,
                num_batches=max(20, 4 * accumulate),
            )
            trainer = NetTrainer(config, world=None if alone else OneRankWorld(parameters))
            trainer.fit()
        losses.append(kept.values())
        places = {
            "parameters": sorted({p.device.type for p in trainer.model.parameters()}),
            "buffers": sorted({b.device.type for b in trainer.model.buffers()}),
        }
        trainer.world.shutdown()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"losses": losses, "peak": peak, **places}
