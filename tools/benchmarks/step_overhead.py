"""Cost of a trainer per training step, beyond a raw PyTorch loop that does the same.

    python tools/benchmarks/step_overhead.py [--json FILE]

A tiny linear model on the CPU, one thread, SGD, gradients clipped by `clip_grad_norm_` in every
loop. With callbacks, each overrides four per-step hooks that do nothing. All loops run in this
process in turns, over a loader that looks at the process's CPU time every 100 batches. A loop's
step in a turn is the lower quartile of these spans; a figure is the median over the turns of the
difference to the raw loop of the same turn. (What else runs on the machine slows down whole spans,
in CPU time too: it shares caches and cores.)
A hand-written loop shows the lower limit;
Lightning, Ignite and TorchTNT take part if installed. Without clipping, no loop computes a norm.
"""

from __future__ import annotations

import argparse
import contextlib
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
from torch import nn

NUM_CALLBACKS = (0, 10, 50)
GOALS_US = {0: 5.0, 10: 10.0, 50: 20.0}
BATCH = (torch.randn(8, 4), torch.randn(8, 1))
MAX_NORM = 1.0

SPAN = 100


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


class Batches:
    """A loader of the same batch, `num_steps` times, that takes the time."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.times_s: list[float] = []

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.num_steps):
            if step % SPAN == 0:
                self.times_s.append(time.process_time())
            yield BATCH

    def step_us(self) -> float:
        """CPU time of a step: lower quartile over the spans."""
        spans_s = [end - start for start, end in itertools.pairwise(self.times_s)]
        return statistics.quantiles(spans_s, n=4)[0] / SPAN * 1e6


Run = Callable[[Batches], object]
"""Trains with each batch of the loader once."""


def raw(*, clip: bool = True) -> Run:
    model, optimizer = make_model()

    def run(loader: Batches) -> None:
        for batch in loader:
            loss = loss_of(model, batch)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()

    return run


def by_hand(num_callbacks: int) -> Run:
    """The raw loop with as many method calls, and the mean of the loss: the lower limit.

    It clips with the two functions that `clip_grad_norm_` is made of, and drops gradients without
    the profiler's range around `zero_grad`: both are a few µs faster.
    """
    model, optimizer = make_model()
    parameters = list(model.parameters())

    class NoOp:
        def hook(self, first: Any, second: Any) -> None: ...

    methods = tuple(NoOp().hook for _ in range(num_callbacks))

    def call_all(first: Any, second: Any) -> None:
        for method in methods:
            method(first, second)

    def run(loader: Batches) -> None:
        losses: list[torch.Tensor] = []
        total = torch.zeros(())
        for batch_idx, batch in enumerate(loader):
            call_all(batch, batch_idx)
            loss = loss_of(model, batch)
            loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            nn.utils.clip_grads_with_norm_(parameters, MAX_NORM, norm)
            call_all(model, optimizer)
            optimizer.step()
            call_all(model, optimizer)
            for parameter in parameters:
                parameter.grad = None
            losses.append(loss.detach())
            if len(losses) == SPAN:
                total += torch.stack(losses).sum()
                losses.clear()
            call_all(losses, batch_idx)

    return run


def dream_trainer(num_callbacks: int, *, clip: bool = True) -> Run:
    from dream_trainer import DreamTrainer, DreamTrainerConfig
    from dream_trainer.callbacks import Callback, CallbackCollection
    from dream_trainer.configs import DeviceParameters, TrainingParameters

    class NoOp(Callback[Any]):
        def pre_train_step(self, batch: Any, batch_idx: int) -> None: ...

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None: ...

        def pre_optimizer_step(self, model: Any, optimizer: Any) -> None: ...

        def post_optimizer_step(self, model: Any, optimizer: Any) -> None: ...

    class Trainer(DreamTrainer):
        def __init__(self, config: DreamTrainerConfig, loader: Batches) -> None:
            super().__init__(config)
            self.loader = loader

        def configure_models(self) -> None:
            self.model, self.optimizer_to_be = make_model()

        def configure_optimizers(self) -> None:
            self.optimizer = self.optimizer_to_be

        def configure_dataloaders(self) -> Any:
            return self.loader

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = loss_of(self.model, batch)
            self.backward(loss)
            if not self.is_accumulating_gradients:
                self.step(self.optimizer)
            return {"loss": loss}

    def run(loader: Batches) -> None:
        config = DreamTrainerConfig(
            device_parameters=DeviceParameters.SINGLE_DEVICE(device="cpu"),
            training_parameters=TrainingParameters(gradient_clip_val=MAX_NORM if clip else None),
            callbacks=CallbackCollection([NoOp() for _ in range(num_callbacks)]),
        )
        Trainer(config, loader).fit()

    return run


def ignite(num_callbacks: int) -> Run:
    from ignite.engine import Engine, Events

    model, optimizer = make_model()

    def update(engine: Any, batch: Any) -> dict[str, Any]:
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}

    def run(loader: Batches) -> None:
        engine = Engine(update)
        # It has two events around a step: four handlers of them make as many calls.
        for _ in range(num_callbacks):
            for event in (Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
                engine.add_event_handler(event, lambda engine: None)
                engine.add_event_handler(event, lambda engine: None)
        engine.run(loader, max_epochs=1)

    return run


def torchtnt(num_callbacks: int) -> Run:
    from torchtnt.framework.callback import Callback
    from torchtnt.framework.train import train
    from torchtnt.framework.unit import TrainUnit

    class NoOp(Callback):
        def on_train_step_start(self, state: Any, unit: Any) -> None: ...

        def on_train_step_end(self, state: Any, unit: Any) -> None: ...

        def on_train_get_next_batch_end(self, state: Any, unit: Any) -> None: ...

        def on_train_get_next_batch_start(self, state: Any, unit: Any) -> None: ...

    class Unit(TrainUnit[Any]):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optimizer = make_model()

        def train_step(self, state: Any, data: Any) -> None:
            loss = loss_of(self.model, data)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def run(loader: Batches) -> None:
        train(Unit(), loader, max_epochs=1, callbacks=[NoOp() for _ in range(num_callbacks)])

    return run


def lightning(num_callbacks: int) -> Run:
    import lightning

    class NoOp(lightning.Callback):
        def on_train_batch_start(self, *args: Any) -> None: ...

        def on_train_batch_end(self, *args: Any) -> None: ...

        def on_before_optimizer_step(self, *args: Any) -> None: ...

        def on_before_zero_grad(self, *args: Any) -> None: ...

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, _ = make_model()

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return loss_of(self.model, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def run(loader: Batches) -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=MAX_NORM,
            callbacks=[NoOp() for _ in range(num_callbacks)],
        )
        trainer.fit(Module(), train_dataloaders=loader)

    return run


OTHERS = {"ignite": ignite, "torchtnt": torchtnt, "lightning": lightning}


def available() -> dict[str, Callable[[int], Run]]:
    """The trainers that can take part; prints to stderr which can't, and why."""
    loops: dict[str, Callable[[int], Run]] = {"by hand": by_hand, "dream_trainer": dream_trainer}
    for name, make in OTHERS.items():
        try:
            make(0)
        except ImportError as error:
            print(f"{name} doesn't take part: {error}", file=sys.stderr)
        else:
            loops[name] = make
    return loops


def step_us(run: Run, num_steps: int) -> float:
    loader = Batches(num_steps)
    run(loader)
    return loader.step_us()


def measure(num_steps: int, num_turns: int) -> dict[str, Any]:
    """Median overhead in µs per step of each loop, with each number of callbacks."""
    runs = {
        (name, num_callbacks): make(num_callbacks)
        for name, make in available().items()
        for num_callbacks in NUM_CALLBACKS
    }
    unclipped = ("dream_trainer, unclipped", 0)
    runs[unclipped] = dream_trainer(0, clip=False)
    raws = {key: raw(clip=key != unclipped) for key in runs}
    raw_us: dict[bool, list[float]] = {True: [], False: []}
    over_us: dict[tuple[str, int], list[float]] = {key: [] for key in runs}
    for run in (*raws.values(), *runs.values()):
        step_us(run, 2 * SPAN + 1)  # warm up
    for _ in range(num_turns):
        for key, run in runs.items():
            before, own, after = (step_us(r, num_steps) for r in (raws[key], run, raws[key]))
            raw_us[key != unclipped].append(min(before, after))
            over_us[key].append(own - min(before, after))
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "num_steps": num_steps,
        "num_turns": num_turns,
        "raw_step_us": statistics.median(raw_us[True]),
        "raw_unclipped_step_us": statistics.median(raw_us[False]),
        "unclipped_overhead_us": statistics.median(over_us.pop(unclipped)),
        "overhead_us": {
            f"{name}/{num_callbacks}": statistics.median(values)
            for (name, num_callbacks), values in over_us.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="per run, at least 300")
    parser.add_argument("--turns", type=int, default=9, help="runs of each loop")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        figures = measure(options.steps, options.turns)
    print(f"raw step: {figures['raw_step_us']:.1f} µs (torch {figures['torch']})")
    print("overhead in µs per step with 0, 10, 50 callbacks of 4 hooks each:")
    for name in dict.fromkeys(key.split("/")[0] for key in figures["overhead_us"]):
        values = [figures["overhead_us"][f"{name}/{n}"] for n in NUM_CALLBACKS]
        print(f"  {name:<15}" + "".join(f"{value:8.1f}" for value in values))
    print("  goal           " + "".join(f"{GOALS_US[n]:8.1f}" for n in NUM_CALLBACKS))
    print(
        f"without clipping: raw step {figures['raw_unclipped_step_us']:.1f} µs, dream_trainer "
        f"{figures['unclipped_overhead_us']:+.1f} µs"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + os.linesep)


if __name__ == "__main__":
    main()
