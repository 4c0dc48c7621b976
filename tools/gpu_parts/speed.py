"""Part 8: a training step compared with a raw loop that does the same, and saves (`saves`)."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_callbacks.logging import JSONLinesSink, LoggerCallback, LRLoggerCallback
from dream_trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.configs import DeviceParameters, TrainingParameters
from tools.gpu_parts import saves
from tools.gpu_parts.part import Part
from tools.gpu_parts.trainers import has_library

WARM_UP = 5
GOAL = 0.99
GOAL_EVERY_STEP = 0.95
TINY_GOALS_US = {"no callbacks": 10.0, "default callbacks, log every 50": 30.0}
LOG_EVERY = (50, 10, 1)

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """A transformer block; attention is causal."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        qkv = self.qkv(self.norm_1(x)).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, C / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm_2(x))
        return out


class GPT(nn.Module):
    """GPT-2 small has `vocabulary` 50304, `context` 1024, `width` 768, 12 blocks and heads."""

    def __init__(self, vocabulary: int, context: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, max(width // 64, 1)) for _ in range(num_blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # (B, T), (B, T) -> ()
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.head(self.norm(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Tiny(nn.Module):
    """A linear layer and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.layer(x), y)


class TimedBatches:
    """A loader of one batch, on the device, that measures the steps after a warm-up.

    Args:
        batch: What it yields.
        num_steps: How often.
    """

    def __init__(self, batch: Batch, num_steps: int) -> None:
        self.batch = batch
        self.num_steps = num_steps
        self.step_s = 0.0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        began_s = 0.0
        for step in range(self.num_steps):
            if step == WARM_UP:
                began_s = self._now()
            if step == self.num_steps - 1:
                self.step_s = (self._now() - began_s) / (step - WARM_UP)
            yield self.batch

    def _now(self) -> float:
        if self.batch[0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class Job:
    """A model with its optimizer, trained by raw loops and trainers in turns.

    Args:
        part: Has the device and a folder.
        model: Returns the loss of a batch; on the device.
        batch: On the device.
        dtype: Of autocast; None for none.
    """

    def __init__(
        self, part: Part, model: nn.Module, batch: Batch, dtype: torch.dtype | None
    ) -> None:
        self.part = part
        self.model = model
        self.batch = batch
        self.dtype = dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=part.on_gpu)

    def raw(self, num_steps: int) -> float:
        """Seconds per step of a loop without a trainer."""
        batches = TimedBatches(self.batch, num_steps)
        device_type = self.part.device
        for inputs, targets in batches:
            context: Any = contextlib.nullcontext()
            if self.dtype is not None:
                context = torch.autocast(device_type, dtype=self.dtype)
            with context:
                loss = self.model(inputs, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return batches.step_s

    def trained(self, num_steps: int, callbacks: list[Callback[Any]]) -> float:
        """Seconds per step of a trainer."""
        batches = TimedBatches(self.batch, num_steps)
        config = DreamTrainerConfig(
            root_dir=self.part.folder / "speed",
            seed=0,
            device_parameters=DeviceParameters.SINGLE_DEVICE(
                device=self.part.device, param_dtype=self.dtype
            ),
            training_parameters=TrainingParameters(n_epochs=1, gradient_clip_val=1.0),
            callbacks=CallbackCollection(callbacks),
        )
        JobTrainer(config, self, batches).fit()
        return batches.step_s


class JobTrainer(DreamTrainer):
    """Trains a job's model, which is compiled already, with its optimizer."""

    def __init__(self, config: DreamTrainerConfig, job: Job, batches: TimedBatches) -> None:
        super().__init__(config)
        self._job = job
        self._batches = batches

    def configure_models(self) -> None:
        self.model = self._job.model

    def configure_optimizers(self) -> None:
        self.optimizer = self._job.optimizer

    def configure_dataloaders(self) -> Any:
        return self._batches

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = self.model(*batch)
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
        return {"loss": loss}


def default_callbacks(log_every: int) -> list[Callback[Any]]:
    """Those of an everyday run; saves are measured on their own."""
    logging: list[Callback[Any]] = [
        LoggerCallback(log_every, sinks=[JSONLinesSink()]),
        LRLoggerCallback(),
    ]
    if not has_library("rich"):
        return logging
    from dream_callbacks.summary import ProgressBar, TrainerSummary

    return [TrainerSummary(), ProgressBar(), *logging]


VARIANTS: dict[str, Callable[[], list[Callback[Any]]]] = {
    "no callbacks": list,
    **{
        f"default callbacks, log every {every}": functools.partial(default_callbacks, every)
        for every in LOG_EVERY
    },
}


def measured(job: Job, num_steps: int, seconds: float) -> tuple[float, dict[str, list[float]]]:
    """Take turns until time has passed, at least twice.

    Returns:
        Median seconds of a raw step, and by variant the seconds in each turn divided by those of
        the raw loops around it.
    """
    give_up_s = time.monotonic() + seconds
    ratios: dict[str, list[float]] = {name: [] for name in VARIANTS}
    raws = [job.raw(num_steps)]
    while time.monotonic() < give_up_s or len(raws) < 1 + 2 * len(VARIANTS):
        for name, make in VARIANTS.items():
            step_s = job.trained(num_steps, make())
            raws.append(job.raw(num_steps))
            ratios[name].append(step_s / min(raws[-2:]))
    return statistics.median(raws), ratios


def run(part: Part) -> None:
    """Measure a tiny net, a GPT, then saves."""
    if not has_library("rich"):
        part.not_run("the progress bar and the summary", "rich isn't installed")
    with part.attempt("tiny net"):
        tiny(part)
    with part.attempt("GPT"):
        gpt(part)
    saves.run(part)


def tiny(part: Part) -> None:
    """A step that is limited by the host: microseconds more than the raw loop."""
    device = torch.device(part.device)
    batch = torch.randn(8, 4, device=device), torch.randn(8, 1, device=device)
    job = Job(part, Tiny().to(device), batch, None)
    raw_s, ratios = measured(job, part.size(2000, 200), part.size(12, 1))
    part.measured("tiny net: raw step, µs", raw_s * 1e6)
    for name, values in ratios.items():
        more_us = (statistics.median(values) - 1) * raw_s * 1e6
        goal = TINY_GOALS_US.get(name)
        if goal is None or part.is_small:
            part.measured(f"tiny net, {name}: more µs per step", more_us)
        else:
            passed = more_us <= goal
            part.expect(f"tiny net, {name}: more µs per step", passed, more_us, f"at most {goal:g}")


def gpt(part: Part) -> None:
    """Throughput in bf16, compiled on a GPU, relative to the raw loop."""
    device = torch.device(part.device)
    sizes = (128, 16, 32, 2) if part.is_small else (50304, 1024, 768, 12)
    model = GPT(*sizes).to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(sizes[0], (part.size(16, 2), sizes[1] + 1), device=device)
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    if not part.is_small:
        model.compile()
    job = Job(part, model, batch, torch.bfloat16)
    began_s = time.perf_counter()
    job.raw(WARM_UP + 2)
    part.measured("GPT: first steps with compilation, s", time.perf_counter() - began_s)
    raw_s, ratios = measured(job, part.size(30, 20), part.size(25, 1))
    part.measured(
        "GPT: raw loop",
        {
            "parameters, M": num_parameters / 1e6,
            "ms per step": raw_s * 1e3,
            "tokens/s": batch[0].numel() / raw_s,
        },
    )
    for name, values in ratios.items():
        throughput = 1 / statistics.median(values)
        goal = GOAL_EVERY_STEP if name.endswith("every 1") else GOAL
        if part.is_small:
            part.measured(f"GPT, {name}: tokens/s relative to raw", throughput)
        else:
            part.expect(
                f"GPT, {name}: tokens/s relative to raw",
                throughput >= goal,
                {"ratio": throughput, "turns": [round(1 / value, 4) for value in values]},
                f"at least {goal:g}",
            )
