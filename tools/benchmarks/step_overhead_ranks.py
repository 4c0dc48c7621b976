"""Cost of a trainer per training step on several ranks, and with slow exchanges between them.

    python tools/benchmarks/step_overhead_ranks.py [--ranks 2 4] [--json FILE]

Gloo ranks on the CPU of this machine, one thread each, with DDP, SGD and gradient clipping in every
loop, for two models: a tiny one, and one whose step takes some 15 ms. All loops take turns in the
same processes. A turn's step time is the lower quartile of its steps, without the first ones,
averaged over the ranks: other load on the machine lengthens most steps now and then, and the mean
even more. Reported are medians over the turns, and medians and quartiles of the ratio to another
loop in the same turn. The raw loop takes part twice: the ratio of the two is the noise.

With delayed exchanges, each all-reduce of the group that carries the trainer's requests completes
no earlier than 5 ms after its start, on every rank. The step must not become longer; the share of
the time that the loop spends waiting for exchanges is added, since a quartile misses rare waits. A
blocking exchange after each step, with the same delay, shows what that would cost otherwise.

Lightning takes part if installed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from delayed_group import DelayCollectives
from torch import nn

from dream_trainer import DreamTrainer, DreamTrainerConfig
from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.configs import DeviceParameters, TrainingParameters
from dream_trainer.testing import run_on_ranks

MAX_NORM = 1.0
DELAY_S = 5e-3
GOAL = 1.02
"""Largest ratio of the step time with delayed exchanges to that without the delay, waits added."""
NUM_WARMUP = 20
"""Untimed steps at the start of each turn: DDP rebuilds its buckets."""
RAW, RAW_AGAIN, OURS = "raw DDP", "raw DDP, again", "dream_trainer"
DELAYED = "dream_trainer, exchanges delayed"
BLOCKING, BLOCKING_DELAYED = "  + blocking exchange per step", "  + the same, delayed"


def make_tiny() -> tuple[nn.Module, Any]:
    return nn.Linear(4, 1), (torch.randn(8, 4), torch.randn(8, 1))


def make_mlp() -> tuple[nn.Module, Any]:
    layers = [layer for _ in range(4) for layer in (nn.Linear(512, 512), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 1)), (torch.randn(128, 512), torch.randn(128, 1))


SIZES = {"tiny": make_tiny, "mlp": make_mlp}


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3)


class Batches:
    """A loader that yields one batch `num_steps` times and times the steps."""

    def __init__(self, batch: Any, num_steps: int) -> None:
        self.batch = batch
        self.num_steps = num_steps
        self.times_s: list[float] = []
        self.cpu_s: list[float] = []

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        self.times_s, self.cpu_s = [], []
        for step in range(self.num_steps):
            if step in (NUM_WARMUP, self.num_steps - 1):
                self.cpu_s.append(time.process_time())
            self.times_s.append(time.perf_counter())
            yield self.batch

    @property
    def durations_s(self) -> list[float]:
        """Seconds of each step except the last."""
        return [end - start for start, end in itertools.pairwise(self.times_s)]


Run = Callable[[], object]
"""Trains with each batch of a loader once."""
Loop = tuple[Run, Batches, DelayCollectives | None]


def raw(size: str, num_steps: int) -> Loop:
    module, batch = SIZES[size]()
    model = nn.parallel.DistributedDataParallel(module)
    optimizer = make_optimizer(model)
    loader = Batches(batch, num_steps)

    def run() -> None:
        for each in loader:
            loss = loss_of(model, each)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    return run, loader, None


class BlockingExchange(Callback[Any]):
    """Agrees on a flag after each step, as a loop does that checks each time whether to stop."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        flag = torch.tensor([0], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.trainer.world.group("each step"))
        flag.item()


def dream_trainer(
    size: str, num_steps: int, *, blocking: bool = False, delay_s: float | None = None
) -> Loop:
    class Trainer(DreamTrainer):
        def configure_models(self) -> None:
            self.model, batch = SIZES[size]()
            self.loader = Batches(batch, num_steps)

        def configure_optimizers(self) -> None:
            self.optimizer = make_optimizer(self.model)

        def configure_dataloaders(self) -> Any:
            return self.loader

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = loss_of(self.model, batch)
            self.backward(loss)
            if not self.is_accumulating_gradients:
                self.step(self.optimizer)
            return {"loss": loss}

    callbacks: list[Callback[Any]] = [BlockingExchange()] if blocking else []
    delays = None
    if delay_s is not None:
        delays = DelayCollectives("each step" if blocking else "requests", delay_s)
        callbacks.append(delays)
    trainer = Trainer(
        DreamTrainerConfig(
            device_parameters=DeviceParameters.DDP(device="cpu"),
            training_parameters=TrainingParameters(n_epochs=1, gradient_clip_val=MAX_NORM),
            callbacks=CallbackCollection(callbacks),
        )
    )
    trainer.setup()

    def run() -> None:
        trainer.fit()
        trainer.training_parameters.n_epochs += 1  # each turn is an epoch

    return run, trainer.loader, delays


def lightning(size: str, num_steps: int) -> Loop:
    import lightning
    from lightning.pytorch.strategies import DDPStrategy

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            return make_optimizer(self)

    model, batch = SIZES[size]()
    loader = Batches(batch, num_steps)

    def run() -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=DDPStrategy(process_group_backend="gloo"),
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=MAX_NORM,
        )
        trainer.fit(Module(model), train_dataloaders=loader)

    return run, loader, None


def available() -> dict[str, Callable[[str, int], Loop]]:
    """The loops that can take part."""
    loops: dict[str, Callable[[str, int], Loop]] = {RAW: raw, OURS: dream_trainer}
    if importlib.util.find_spec("dream_trainer.world.requests"):  # older versions have none
        loops[DELAYED] = functools.partial(dream_trainer, delay_s=DELAY_S)
    loops[RAW_AGAIN] = raw
    loops[BLOCKING] = functools.partial(dream_trainer, blocking=True)
    loops[BLOCKING_DELAYED] = functools.partial(dream_trainer, blocking=True, delay_s=DELAY_S)
    if importlib.util.find_spec("lightning"):
        loops["lightning"] = lightning
    return loops


def take_turn(run: Run, loader: Batches) -> dict[str, float]:
    """Figures of a turn on this rank, in ms per step."""
    gc.collect()
    dist.barrier()
    run()
    durations_s = loader.durations_s[NUM_WARMUP:]
    start_s, end_s = loader.cpu_s
    return {
        "quartile_ms": statistics.quantiles(durations_s, n=4)[0] * 1e3,
        "mean_ms": statistics.fmean(durations_s) * 1e3,
        "cpu_ms": (end_s - start_s) / len(durations_s) * 1e3,
    }


def on_rank(directory: str, size: str, turn_s: float, num_turns: int) -> dict[str, Any]:
    """All turns of all loops, on one rank."""
    os.chdir(directory)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    run, loader, _ = raw(size, 10 * NUM_WARMUP)
    step_s = torch.tensor(take_turn(run, loader)["quartile_ms"] / 1e3)
    dist.broadcast(step_s, 0)
    num_steps = int(turn_s / step_s.item()) + 4 * NUM_WARMUP
    loops = {
        # A quarter of the steps is enough where an exchange in each step makes them long.
        name: make(size, num_steps // (4 if name in (BLOCKING, BLOCKING_DELAYED) else 1))
        for name, make in available().items()
    }
    for run, loader, _ in loops.values():
        take_turn(run, loader)
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    waits_ms: list[float] = []
    with_ms: list[float] = []
    without_ms: list[float] = []
    for turn in range(num_turns):
        for name in list(loops)[:: 1 if turn % 2 == 0 else -1]:
            run, loader, delays = loops[name]
            turns[name].append(take_turn(run, loader))
            if name == DELAYED and delays is not None:
                waits_ms += [wait * 1e3 for step, wait in delays.waits_s if step >= NUM_WARMUP]
                for step, duration_s in enumerate(loader.durations_s[NUM_WARMUP:], NUM_WARMUP):
                    (with_ms if step in delays.steps else without_ms).append(duration_s * 1e3)
    exchanges = {
        "waits_ms": waits_ms,
        "waited": sum(waits_ms) / (sum(with_ms) + sum(without_ms) or 1.0),
        "step_with_ms": statistics.median(with_ms or [0.0]),
        "step_without_ms": statistics.median(without_ms or [0.0]),
    }
    return {"num_steps": num_steps, "turns": turns, "exchanges": exchanges}


def measure(num_ranks: int, size: str, turn_s: float, num_turns: int) -> dict[str, Any]:
    """Figures of one model on a number of ranks."""
    with tempfile.TemporaryDirectory() as directory:
        work = (on_rank, num_ranks, directory, size, turn_s, num_turns)
        ranks = run_on_ranks(*work, timeout_s=3600.0)

    def per_turn(name: str, key: str) -> list[float]:
        of_ranks = [[turn[key] for turn in rank["turns"][name]] for rank in ranks]
        return [statistics.fmean(values) for values in zip(*of_ranks, strict=True)]

    def ratio(name: str, base: str, key: str) -> list[float]:
        """Quartiles over the turns."""
        pairs = zip(per_turn(name, key), per_turn(base, key), strict=True)
        return statistics.quantiles([value / of for value, of in pairs], n=4)

    keys = ("quartile_ms", "mean_ms", "cpu_ms")
    loops = {
        name: {key: statistics.median(per_turn(name, key)) for key in keys}
        | {f"{key}_to_raw": ratio(name, RAW, key) for key in keys}
        for name in ranks[0]["turns"]
    }
    figures = {"num_ranks": num_ranks, "size": size, "num_steps": ranks[0]["num_steps"]}
    figures["loops"] = loops
    if DELAYED in loops:
        figures["delayed_to_ours"] = {key: ratio(DELAYED, OURS, key) for key in keys}
        waits_ms = [wait_ms for rank in ranks for wait_ms in rank["exchanges"]["waits_ms"]]
        figures["exchanges"] = {
            "number": len(waits_ms) // num_ranks,
            "longest_wait_ms": max(waits_ms, default=0.0),
            "median_wait_ms": statistics.median(waits_ms or [0.0]),
        } | {
            key: statistics.fmean(rank["exchanges"][key] for rank in ranks)
            for key in ("waited", "step_with_ms", "step_without_ms")
        }
        figures["delayed"] = (
            figures["delayed_to_ours"]["quartile_ms"][1] + figures["exchanges"]["waited"]
        )
    return figures


def show(figures: dict[str, Any]) -> None:
    print(
        f"{figures['num_ranks']} ranks, {figures['size']}, {figures['num_steps']} steps per turn; "
        "ms per step: lower quartile, mean, CPU; ratios to raw DDP (quartiles of the first)"
    )
    for name, loop in figures["loops"].items():
        low, _, high = loop["quartile_ms_to_raw"]
        ratios = "".join(f"{loop[f'{k}_ms_to_raw'][1]:7.3f}" for k in ("quartile", "mean", "cpu"))
        values = "".join(f"{loop[f'{k}_ms']:8.3f}" for k in ("quartile", "mean", "cpu"))
        print(f"  {name:<34}{values} {ratios}  ({low:.3f} to {high:.3f})")
    if DELAYED in figures["loops"]:
        low, median, high = figures["delayed_to_ours"]["quartile_ms"]
        exchanges = figures["exchanges"]
        print(
            f"  delayed / not delayed: {median:.3f} ({low:.3f} to {high:.3f}); with "
            f"{exchanges['waited']:.3%} of the time waited: {figures['delayed']:.3f}; goal {GOAL}\n"
            f"  {exchanges['number']} delayed exchanges: waited {exchanges['median_wait_ms']:.3f} "
            f"ms each, at most {exchanges['longest_wait_ms']:.3f} ms; steps with one took "
            f"{exchanges['step_with_ms']:.3f} ms, others {exchanges['step_without_ms']:.3f} ms"
        )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="how many")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--turn-s", type=float, default=2.0, help="of a raw loop, in seconds")
    parser.add_argument("--turns", type=int, default=9, help="of each loop, at least 2")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    for name in sorted({DELAYED, "lightning"} - set(available())):
        print(f"{name} doesn't take part: it isn't in this environment")
    result = {"torch": torch.__version__, "python": platform.python_version()}
    result |= {"num_cores": os.cpu_count(), "measured": []}
    print(f"torch {torch.__version__}, {os.cpu_count()} cores")
    for num_ranks, size in itertools.product(options.ranks, options.sizes):
        figures = measure(num_ranks, size, options.turn_s, options.turns)
        result["measured"].append(figures)
        show(figures)
        if options.json:
            options.json.write_text(json.dumps(result, indent=2) + os.linesep)
    ratios = [figures["delayed"] for figures in result["measured"] if "delayed" in figures]
    raise SystemExit(0 if all(ratio <= GOAL for ratio in ratios) else 1)


if __name__ == "__main__":
    main()
