"""Part 7: results of steps that replay CUDA graphs are kept and averaged; nothing is recompiled."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dream_callbacks.profile import ProfileCallback
from dream_callbacks.profile.compilations import CompileWatch
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import Losses, NetTrainer, largest_difference, net_config

COMPARED = 20
"""Steps whose losses are compared with an eager run; later ones drift apart."""
TOLERANCE = 1e-4


class Compiled(NetTrainer):
    """Its loss is the output of a CUDA graph, which the next replay overwrites."""

    loss_of: Callable[[Tensor, Tensor], Tensor]

    def configure_models(self) -> None:
        super().configure_models()

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(self.model(x), y)

        if self.world.device.type == "cuda":
            self.loss_of = torch.compile(loss_of, mode="reduce-overhead")
        else:
            self.loss_of = torch.compile(loss_of, backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = self.loss_of(x, y)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}


class Watches(Callback[NetTrainer]):
    """Reads each loss at once, and notes the steps that compile something, and the epoch's mean."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.compiled_in: list[int] = []
        self.mean = 0.0
        self._watch = CompileWatch()

    def pre_fit(self) -> None:
        self._watch.start()

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.losses.append(result["loss"].item())
        self.compiled_in += [self.trainer.global_step] * len(self._watch.take())

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.mean = result["loss"]

    def post_fit(self) -> None:
        self._watch.stop()


def run(part: Part) -> None:
    """Train 300 steps with graphs, and the first of them eagerly."""
    steps = part.size(300, 30)
    kept, watches, profiles = Losses(), Watches(), ProfileCallback(skip_first=10)
    train(part, Compiled, "graphs", [kept, watches, profiles], steps)
    values = kept.values()
    part.expect(
        f"results of {steps} steps, kept until the end",
        values == watches.losses,
        {"equal": values == watches.losses, "last": values[-1]},
        "those that were read in each step",
    )
    mean = sum(watches.losses) / len(watches.losses)
    difference = largest_difference([watches.mean], [mean])
    part.expect("the epoch's mean", difference < 1e-5, difference, "that of the losses to 1e-5")
    later = sorted({step for step in watches.compiled_in if step > 2})
    part.expect(
        "compilations after step 2",
        later == [] and bool(watches.compiled_in),
        {"steps that compile": sorted(set(watches.compiled_in))},
        "none, and some before",
    )
    with part.attempt("losses compared with an eager run"):
        eager = Losses()
        train(part, NetTrainer, "eager", [eager], COMPARED, num_batches=steps)
        difference = largest_difference(values[:COMPARED], eager.values())
        part.expect(
            "losses compared with an eager run",
            difference <= TOLERANCE,
            difference,
            f"equal to {TOLERANCE:g} in {COMPARED} steps",
        )
    if part.needs_gpu("graphs are replayed"):
        (trace,) = profiles.traces
        with gzip.open(trace) as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        launches = names.count("cudaGraphLaunch")
        part.expect("graphs are replayed", launches > 0, launches, "cudaGraphLaunch in the trace")


def train(
    part: Part,
    kind: type[NetTrainer],
    name: str,
    callbacks: list[Callback[Any]],
    steps: int,
    *,
    num_batches: int | None = None,
) -> None:
    """Train on the part's device."""
    config = net_config(
        part.folder / name,
        DeviceParameters.SINGLE_DEVICE(device=part.device),
        callbacks,
        training={"max_steps": steps, "gradient_clip_val": 1.0},
        num_batches=num_batches or steps,
    )
    kind(config).fit()
