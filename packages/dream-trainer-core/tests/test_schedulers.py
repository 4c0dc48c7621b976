"""Learning rate schedulers: where they are found, and when they are stepped."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import LRSchedule


class Rates(Callback[TinyTrainer]):
    """Keeps the learning rate of each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def pre_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Halving:
    """A scheduler that isn't torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] /= 2

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Unattached(Halving):
    """One that doesn't refer to an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.groups, self.count = optimizer.param_groups, 0

    def step(self) -> None:
        self.count += 1
        for group in self.groups:
            group["lr"] /= 2


class Wrapping(Halving):
    """One that steps another one."""

    def __init__(self, optimizer: torch.optim.Optimizer, inner: LRScheduler) -> None:
        super().__init__(optimizer)
        self.inner = inner

    def step(self) -> None:
        self.inner.step()


def trainer_with(configure: Callable[[Any], Any], where: str = "configure_schedulers") -> Any:
    """A trainer class whose `where` also calls `configure`, and returns what it returns."""

    def method(self: Any) -> Any:
        if where == "configure_optimizers":
            TinyTrainer.configure_optimizers(self)
        return configure(self)

    return type("Scheduled", (TinyTrainer,), {where: method})


def rates_of(kind: Any, tmp_path: Path, **training: Any) -> list[float]:
    rates = Rates()
    kind(tiny_config(tmp_path, [rates], **training)).fit()
    return rates.rates


def plain_rates(
    make: Callable[[torch.optim.Optimizer], Any], num_steps: int, every: int = 1
) -> list[float]:
    """Learning rates of a plain loop that steps a scheduler after every so many steps."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler, rates = make(optimizer), []
    for index in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (index + 1) % every == 0:
            scheduler.step()
    return rates


def warmed_up(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    warm_up, cosine = LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 9)
    return warm_up, cosine, SequentialLR(optimizer, [warm_up, cosine], milestones=[3])


def chained(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    parts = ConstantLR(optimizer, 0.1, 4), ExponentialLR(optimizer, 0.9)
    return *parts, ChainedScheduler(parts, optimizer)


def wrapped(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    inner = ExponentialLR(optimizer, 0.9)
    return inner, Wrapping(optimizer, inner)


@pytest.mark.parametrize("make", [warmed_up, chained, wrapped])
def test_parts_of_a_scheduler_are_stepped_by_it_alone(tmp_path: Path, make: Any) -> None:
    def configure(trainer: Any) -> None:
        *trainer.parts, trainer.scheduler = make(trainer.optimizer)
        trainer.part = trainer.parts[0]

    found = rates_of(trainer_with(configure), tmp_path, n_epochs=2)

    assert found == plain_rates(lambda optimizer: make(optimizer)[-1], num_steps=16)


def in_an_attribute(trainer: Any) -> None:
    trainer.scheduler = StepLR(trainer.optimizer, 1, 0.5)


def underscored(trainer: Any) -> None:
    trainer._scheduler = StepLR(trainer.optimizer, 1, 0.5)  # noqa: SLF001  # the user's


def in_a_list(trainer: Any) -> None:
    trainer.schedulers = [StepLR(trainer.optimizer, 1, 0.5)]


def in_a_dict(trainer: Any) -> None:
    trainer.schedulers = {trainer.optimizer: {"a": StepLR(trainer.optimizer, 1, 0.5)}}


def of_another_class(trainer: Any) -> None:
    trainer.scheduler = Halving(trainer.optimizer)


def unattached_in_a_list(trainer: Any) -> None:
    trainer.schedulers = [Unattached(trainer.optimizer)]


def returned(trainer: Any) -> Any:
    return {trainer.optimizer: Halving(trainer.optimizer)}


def as_a_schedule(trainer: Any) -> Any:
    trainer.schedule = LRSchedule(StepLR(trainer.optimizer, 1, 0.5))


@pytest.mark.parametrize(
    ("configure", "where", "name"),
    [
        (in_an_attribute, "configure_schedulers", "scheduler"),
        (in_an_attribute, "configure_optimizers", "scheduler"),
        (underscored, "configure_schedulers", "_scheduler"),
        (in_a_list, "configure_optimizers", "schedulers/0"),
        (in_a_dict, "configure_schedulers", "schedulers/0/a"),
        (of_another_class, "configure_schedulers", "scheduler"),
        (unattached_in_a_list, "configure_schedulers", "schedulers/0"),
        (returned, "configure_schedulers", "scheduler"),
        (as_a_schedule, "configure_optimizers", "schedule"),
    ],
)
def test_schedulers_are_found(tmp_path: Path, configure: Any, where: str, name: str) -> None:
    rates = Rates()
    trainer = trainer_with(configure, where)(tiny_config(tmp_path, [rates], max_steps=3))
    trainer.fit()

    assert rates.rates == [1e-2, 5e-3, 2.5e-3]
    assert list(trainer.named_schedulers()) == [name]
    assert list(trainer.state_dict()["schedulers"]) == [name]


def returned_schedule(trainer: Any) -> Any:
    trainer.scheduler = StepLR(trainer.optimizer, 2, 0.1)
    return LRSchedule(trainer.scheduler, interval="epoch")


def lightnings_dict(trainer: Any) -> Any:
    return {"scheduler": StepLR(trainer.optimizer, 2, 0.1), "interval": "epoch", "frequency": 1}


def lightnings_optimizers(trainer: Any) -> Any:
    scheduler = StepLR(trainer.optimizer, 2, 0.1)
    options = {"scheduler": scheduler, "interval": "epoch", "monitor": "val_loss"}
    return {"optimizer": trainer.optimizer, "lr_scheduler": options}


@pytest.mark.parametrize(
    ("configure", "where"),
    [
        (returned_schedule, "configure_schedulers"),
        (lightnings_dict, "configure_schedulers"),
        (lightnings_optimizers, "configure_optimizers"),
    ],
)
def test_an_interval_of_an_epoch(tmp_path: Path, configure: Any, where: str) -> None:
    found = rates_of(trainer_with(configure, where), tmp_path, n_epochs=5)

    assert found == plain_rates(lambda opt: StepLR(opt, 2, 0.1), num_steps=40, every=8)


# By a result


class Plateau(TinyTrainer):
    """Its scheduler reduces the rate with each result that isn't twice as good as the best."""

    monitor = "val_loss"
    interval: Any = None

    def configure_schedulers(self) -> Any:
        self.scheduler = ReduceLROnPlateau(self.optimizer, patience=0, factor=0.5, threshold=0.5)
        return LRSchedule(self.scheduler, monitor=self.monitor, interval=self.interval)


class Results(Callback[Any]):
    """Keeps results, and the state of a trainer at one call of a hook."""

    def __init__(self, hook: str = "", call: int = 0) -> None:
        self.val_losses: list[float] = []
        self.losses: list[float] = []
        self.hook, self.call, self.num_calls = hook, call, 0
        self.state: Any = None

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.look("post_train_step")

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.losses.append(result["loss"])
        self.look("post_train_epoch")

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.val_losses.append(result["val_loss"])
        self.look("post_validation_epoch")

    def post_epoch(self) -> None:
        self.look("post_epoch")

    def look(self, hook: str) -> None:
        if hook == self.hook:
            self.num_calls += 1
            if self.num_calls == self.call:
                self.state = copy.deepcopy(self.trainer.state_dict())


@pytest.mark.parametrize(
    ("monitor", "interval", "every"),
    [("val_loss", None, None), ("loss", None, None), ("val_loss", "validation", 3)],
)
def test_a_scheduler_is_stepped_by_each_result(
    tmp_path: Path, monitor: str, interval: Any, every: int | None
) -> None:
    results = Results()
    kind = type("Mine", (Plateau,), {"monitor": monitor, "interval": interval})
    trainer = kind(tiny_config(tmp_path, [results], n_epochs=4, val_every_n_steps=every))
    trainer.fit()

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
    plain = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
    for value in results.losses if monitor == "loss" else results.val_losses:
        plain.step(value)
    assert trainer.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-2
    assert trainer.scheduler.state_dict() == plain.state_dict()


def training_of(trainer: TinyTrainer) -> Any:
    state = trainer.state_dict()
    weights = {k: v.tolist() for k, v in state["models"]["model"].items()}
    groups = state["optimizers"]["optimizer"]["param_groups"]
    return weights, groups, state["schedulers"], state["trainer"]["counters"]


@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
@pytest.mark.parametrize(
    ("hook", "call"),
    [
        ("post_train_step", 11),
        ("post_train_step", 16),
        ("post_train_epoch", 2),
        ("post_validation_epoch", 2),
        ("post_epoch", 2),
    ],
)
def test_it_is_stepped_once_per_epoch_when_resumed(
    tmp_path: Path, hook: str, call: int, monitor: str
) -> None:
    kind = type("Mine", (Plateau,), {"monitor": monitor})
    results = Results(hook, call)
    straight = kind(tiny_config(tmp_path, [results], n_epochs=4))
    straight.fit()
    resumed = kind(tiny_config(tmp_path, [Results()], n_epochs=4))
    resumed.setup()
    resumed.load_state_dict(results.state)
    resumed.fit()

    assert training_of(resumed) == training_of(straight)


def test_the_validation_of_a_run_that_ends_in_mid_epoch_steps_nothing(tmp_path: Path) -> None:
    class Looks(Results):
        def look(self, hook: str) -> None:
            if hook == "post_validation_epoch":
                self.trainer.num_bad = self.trainer.scheduler.num_bad_epochs
                self.state = copy.deepcopy(self.trainer.state_dict())

    looks = Looks()
    stopped = Plateau(tiny_config(tmp_path, [looks], max_steps=11))
    stopped.fit()
    resumed = Plateau(tiny_config(tmp_path, [Results()], max_steps=27))
    resumed.setup()
    resumed.load_state_dict(stopped.state_dict())
    resumed.fit()
    straight = Plateau(tiny_config(tmp_path, [Results()], max_steps=27))
    straight.fit()

    assert len(looks.val_losses) == 2
    assert looks.state["schedulers"]["scheduler"]["last_epoch"] == 1, "nor is it saved in between"
    assert training_of(resumed) == training_of(straight)


def test_evaluating_steps_nothing(tmp_path: Path) -> None:
    trainer = Plateau(tiny_config(tmp_path))
    trainer.validate()

    assert trainer.scheduler.last_epoch == 0


class DiffersByRank(Plateau):
    monitor = "mine"

    def configure_metrics(self) -> None:
        trainer = self

        class Rank:
            count = 0

            def update(self) -> None: ...

            def reset(self) -> None: ...

            def compute(self) -> float:
                Rank.count += 1
                return Rank.count * (-1.0 if trainer.world.rank else 1.0)

        self.mine = Rank()


def rate_of_differing(tmp_path: Path) -> float:
    trainer = DiffersByRank(tiny_config(tmp_path, n_epochs=3))
    trainer.fit()
    return float(trainer.optimizer.param_groups[0]["lr"])


def test_all_ranks_step_by_the_value_of_rank_zero(tmp_path: Path) -> None:
    assert run_on_ranks(rate_of_differing, 2, tmp_path) == [2.5e-3, 2.5e-3]


# What is refused


def no_such_key(trainer: Any) -> Any:
    return LRSchedule(ReduceLROnPlateau(trainer.optimizer), monitor="val_accuracy")


def not_once_per_epoch(trainer: Any) -> Any:
    trainer.training_parameters.val_every_n_steps = 20
    return LRSchedule(ReduceLROnPlateau(trainer.optimizer), monitor="val_loss")


def no_such_key_in_validation(trainer: Any) -> Any:
    scheduler = ReduceLROnPlateau(trainer.optimizer)
    return LRSchedule(scheduler, monitor="loss", interval="validation")


def no_interval(trainer: Any) -> Any:
    trainer.scheduler = {"scheduler": StepLR(trainer.optimizer, 1)}


def frequency(trainer: Any) -> Any:
    return {"scheduler": StepLR(trainer.optimizer, 1), "interval": "step", "frequency": 2}


def lost(trainer: Any) -> None:
    StepLR(trainer.optimizer, 1)


def of_a_foreign_optimizer(trainer: Any) -> None:
    trainer.scheduler = StepLR(torch.optim.SGD(trainer.model.parameters()), 1)


def two_intervals(trainer: Any) -> Any:
    scheduler = StepLR(trainer.optimizer, 1)
    return [LRSchedule(scheduler), LRSchedule(scheduler, interval="epoch")]


def part_with_options(trainer: Any) -> Any:
    warm_up, _, trainer.scheduler = warmed_up(trainer.optimizer)
    return LRSchedule(warm_up, interval="epoch")


def without_state(trainer: Any) -> None:
    trainer.scheduler = type("Stateless", (), {"step": lambda self: None})()


def needs_the_epoch(trainer: Any) -> None:
    kind = type("ByEpoch", (Halving,), {"step": lambda self, epoch, metric=None: None})
    trainer.scheduler = kind(trainer.optimizer)


def returns_a_number(trainer: Any) -> Any:
    return [StepLR(trainer.optimizer, 1), 3]


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (no_such_key, "'val_accuracy' is in no result .* loss, validation reported val_loss; set"),
        (not_once_per_epoch, 'no validation ran; .* every N steps, interval="validation"'),
        (no_such_key_in_validation, r"'loss' isn't in the result of validation \(val_loss\); set"),
        (no_interval, 'has no "interval": Lightning\'s default is "epoch"'),
        (frequency, "option 'frequency': 2 of StepLR isn't known here; write LRSchedule"),
        (lost, "neither assigned to an attribute of the trainer nor returned"),
        (of_a_foreign_optimizer, r"'scheduler' \(StepLR\) refers to none of the optimizers"),
        (two_intervals, "two intervals or monitors"),
        (part_with_options, "is a part of another one, which steps it"),
        (without_state, "a Stateless in configure_schedulers has a method step, and no state_d"),
        (needs_the_epoch, r"ByEpoch.step\(epoch, metric=None\) can't be called as step\(\); if"),
        (returns_a_number, "configure_schedulers returned 3; schedulers are required"),
    ],
)
def test_what_would_be_wrong_is_refused(tmp_path: Path, configure: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        trainer_with(configure)(tiny_config(tmp_path)).fit()


def returned_alone(trainer: Any) -> Any:
    return [trainer.optimizer], [StepLR(trainer.optimizer, 1)]


@pytest.mark.parametrize(
    ("configure", "message"),
    [
        (returned_alone, 'Lightning, which steps it once per epoch, .* "interval": "epoch"'),
        (
            of_another_class,
            r"self.scheduler \(Halving\) looks like a scheduler, .*; assign it",
        ),
    ],
)
def test_unclear_schedulers_of_configure_optimizers_are_refused(
    tmp_path: Path, configure: Any, message: str
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer_with(configure, "configure_optimizers")(tiny_config(tmp_path)).setup()


def schedule(kind: str, **options: Any) -> LRSchedule:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    is_plateau = kind == "plateau"
    return LRSchedule(
        ReduceLROnPlateau(optimizer) if is_plateau else StepLR(optimizer, 1), **options
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("step", {"interval": "batch"}, '"step", "epoch", "validation" or "manual" is required'),
        ("plateau", {"interval": "epoch"}, "needs the result to reduce on; set monitor"),
        ("plateau", {"interval": "step", "monitor": "loss"}, "set interval="),
        ("step", {"monitor": "loss"}, r"StepLR.step\(.* can't be called as step\(value\)"),
    ],
)
def test_options_that_exclude_each_other_are_refused(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        schedule(kind, **options)


def test_a_plateau_that_nobody_steps_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def configure(trainer: Any) -> None:
        trainer.scheduler = ReduceLROnPlateau(trainer.optimizer)

    class Steps(Callback[Any]):
        def post_epoch(self) -> None:
            self.trainer.scheduler.step(1.0)

    with caplog.at_level(logging.WARNING):
        trainer_with(configure)(tiny_config(tmp_path, [Steps()], n_epochs=2)).fit()
        assert not caplog.messages
        trainer_with(configure)(tiny_config(tmp_path, n_epochs=2)).fit()

    assert [message[:58] for message in caplog.messages] == [
        "scheduler 'scheduler' (ReduceLROnPlateau) was never steppe"
    ]


def test_a_manual_scheduler_is_saved_and_not_stepped(tmp_path: Path) -> None:
    def configure(trainer: Any) -> Any:
        return LRSchedule(StepLR(trainer.optimizer, 1), interval="manual")

    trainer = trainer_with(configure)(tiny_config(tmp_path))
    trainer.fit()

    assert trainer.state_dict()["schedulers"]["scheduler"]["last_epoch"] == 0
