"""Stopped and resumed equals never stopped, bit for bit: `prove` for many kinds of runs."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from training import CALLBACKS, LOADERS, Augmented, Everything, make

from dream_callbacks.checkpoint.testing import prove
from dream_trainer.callbacks import Every
from dream_trainer.testing import TinyTrainer

NUM_RANKS = {"single": 1, "ddp": 2, "fsdp": 2}
STEPS = {"first_step": (1, 1), "mid_epoch": (4, 3), "second_epoch": (8, 5)}
"""Steps before the kill, with 6 batches in an epoch: of 1 batch each, of 3."""


@dataclass(frozen=True)
class Run:
    """A kind of run, and where it is killed."""

    layout: str
    stop: str
    loader: str
    num_workers: int
    shuffle: bool
    augmentation: bool
    dropout: bool
    scheduler: bool
    accumulation: int
    callback: str
    reports: str = "loss"

    def __str__(self) -> str:
        parts = [self.layout, self.stop, self.loader, f"w{self.num_workers}"]
        parts += [
            n for n in ("shuffle", "augmentation", "dropout", "scheduler") if getattr(self, n)
        ]
        parts += [f"a{self.accumulation}", self.callback]
        return "-".join([*parts, *(["all_kinds"] if self.reports == "all kinds" else [])])

    @property
    def is_possible(self) -> bool:
        if self.loader == "persistent" and not self.num_workers:
            return False
        # The random state of their workers can't be saved or restored.
        keeps_to_itself = self.loader in ("persistent", "stateful")
        return not (keeps_to_itself and self.num_workers and self.augmentation)


AXES: dict[str, tuple[Any, ...]] = {
    "layout": tuple(NUM_RANKS),
    "stop": ("mid_epoch", "epoch_end", "inside_validation", "first_step", "second_epoch"),
    "loader": tuple(LOADERS),
    "num_workers": (0, 2),
    "shuffle": (True, False),
    "augmentation": (True, False),
    "dropout": (True, False),
    "scheduler": (True, False),
    "accumulation": (1, 3),
    "callback": tuple(CALLBACKS),
    "reports": ("loss", "all kinds"),
}


def covering() -> list[Run]:
    """A small set of cells that has each pair of values of two axes."""
    draw = random.Random(0)
    missing = {
        frozenset((pair_a, pair_b))
        for a, b in itertools.combinations(AXES, 2)
        for pair_a in ((a, value) for value in AXES[a])
        for pair_b in ((b, value) for value in AXES[b])
    }
    missing -= {
        frozenset({("loader", "persistent"), other})
        for other in (("num_workers", 0), ("augmentation", True))
    }
    runs = []
    while missing:
        drawn = (Run(**{axis: draw.choice(AXES[axis]) for axis in AXES}) for _ in range(300))
        best = max((run for run in drawn if run.is_possible), key=lambda r: len(_met(r) & missing))
        missing -= _met(best)
        runs.append(best)
    return runs


def _met(run: Run) -> set[frozenset[tuple[str, Any]]]:
    pairs = dataclasses.asdict(run).items()
    return {frozenset(both) for both in itertools.combinations(pairs, 2)}


def product() -> list[Run]:
    """All combinations with a plain DataLoader; callback and results are drawn at random."""
    axes = {**AXES, "stop": AXES["stop"][:3], "loader": ("plain",)}
    axes |= dict.fromkeys(("callback", "reports"), ("",))
    runs = [Run(*values) for values in itertools.product(*axes.values())]
    draw = random.Random(0)  # by turns, each would meet one accumulation alone
    return [
        dataclasses.replace(
            run, **{axis: draw.choice(AXES[axis]) for axis in ("callback", "reports")}
        )
        for run in runs
    ]


def trainer_of(run: Run) -> Any:
    training = {"max_steps": 1, "gradient_accumulation_steps": run.accumulation}
    trainer = make(Path("runs"), layout=run.layout, callback=run.callback, training=training)
    trainer.loader, trainer.num_workers, trainer.reports = run.loader, run.num_workers, run.reports
    trainer.shuffle, trainer.has_scheduler = run.shuffle, run.scheduler
    trainer.noise = Everything.noise * run.augmentation
    trainer.dropout = Everything.dropout * run.dropout
    return trainer


@pytest.mark.parametrize(
    "run", [*covering(), *(pytest.param(run, marks=pytest.mark.full) for run in product())], ids=str
)
def test_killed_and_resumed_equals_never_stopped(tmp_path: Path, run: Run) -> None:
    one, three = STEPS.get(run.stop, (6, 2))  # at the end of the first epoch

    proof = prove(
        functools.partial(trainer_of, run),
        tmp_path,
        steps=one if run.accumulation == 1 else three,
        every=Every(epochs=1) if run.stop == "epoch_end" else None,
        kill_in="validation" if run.stop == "inside_validation" else "step",
        num_ranks=NUM_RANKS[run.layout],
        timeout_s=60,
    )

    proof.check()
    assert proof.num_values > 100


class UnevenSets(Everything):
    """Two validation sets; of the second, some ranks have fewer batches than others."""

    def configure_dataloaders(self) -> Any:
        train, even = super().configure_dataloaders()
        five = TinyTrainer.loader(self, Augmented(5, self.noise), self.world.dp_size)
        return train, {"even": even, "five": five}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        noise = torch.rand(()) * (1 + (self.validation_set == "five"))
        return {"val_loss": self.model(batch + noise).square().mean()}


def with_uneven_sets(layout: str) -> Any:
    return make(Path("runs"), kind=UnevenSets, layout=layout, training={"max_steps": 1})


@pytest.mark.parametrize("kill_in", ["step", "validation"])
@pytest.mark.parametrize(("layout", "num_ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_runs_with_uneven_validation_sets_are_exact(
    tmp_path: Path, layout: str, num_ranks: int, kill_in: Any
) -> None:
    proof = prove(
        functools.partial(with_uneven_sets, layout),
        tmp_path,
        steps=6,
        kill_in=kill_in,
        num_ranks=num_ranks,
        timeout_s=60,
    )

    proof.check()
    assert proof.num_values > 100
