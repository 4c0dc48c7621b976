"""Ranks that disagree: an error on all of them with the values by rank, never a hang."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_trainer.callbacks import Callback, RankZeroCallback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


class Counts(Callback[TinyTrainer]):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        pass


class OnRankZero(RankZeroCallback[TinyTrainer]):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        pass


class NoLength:
    """An iterable of batches without length.

    Args:
        batches: The batches.
        at_most: Largest number of batches.
    """

    def __init__(self, batches: Iterable[Any], at_most: int) -> None:
        self.batches = batches
        self.at_most = at_most

    def __iter__(self) -> Iterator[Any]:
        for _, batch in zip(range(self.at_most), self.batches, strict=False):
            yield batch


class SaysTooMuch(NoLength):
    def __len__(self) -> int:
        return self.at_most + 1


class Dissenter(TinyTrainer):
    """Differs in one respect on the last rank."""

    about = ""

    def dissents(self, about: str) -> bool:
        return self.about == about and self.world.rank == self.world.world_size - 1

    def configure_models(self) -> None:
        super().configure_models()
        if self.dissents("shapes"):
            self.model.head = nn.Linear(8, 2)
        if self.dissents("frozen"):
            self.model.embed.bias.requires_grad_(False)
        if self.dissents("order"):
            embed = self.model.embed
            del self.model.embed
            self.model.embed = embed
        if self.dissents("models"):
            self.extra = nn.Linear(1, 1)

    def configure_optimizers(self) -> None:
        super().configure_optimizers()
        if self.dissents("optimizers"):
            self.optimizer = torch.optim.SGD(list(self.model.parameters())[1:], lr=0.1)

    def configure_schedulers(self) -> None:
        if self.dissents("schedulers"):
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1)

    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        if self.about == "validation_without_length":
            return train, NoLength(val, 1 if self.world.rank else 2)
        if self.dissents("short_validation"):
            return train, SaysTooMuch(val, 1)
        if self.dissents("short_training"):
            return SaysTooMuch(train, 7), val
        if self.about == "shorter_validation":
            return train, list(val)[: 1 if self.world.rank else 2]
        if self.dissents("no_validation"):
            return train
        return train, val

    def configure_metrics(self) -> None:
        if self.dissents("metrics"):
            self.metric = Constant()
        if self.about == "metric_keys":
            self.metric = Constant("top5" if self.dissents("metric_keys") else "top1")

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        if self.dissents("results"):
            result["accuracy"] = torch.tensor(1.0)
        return result


class Constant:
    def __init__(self, key: str = "accuracy") -> None:
        self.key = key

    def update(self, value: float) -> None: ...

    def compute(self) -> dict[str, float]:
        return {self.key: 1.0}

    def reset(self) -> None: ...


def train(root: str, about: str) -> tuple[int, int]:
    import os

    is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    steps = 3 if about == "training" and is_last else 2
    callbacks: list[Callback[Any]] = [Counts()]
    if about == "callbacks" and is_last:
        callbacks.append(Counts())
    if about == "rank_zero_callbacks" and not is_last:
        callbacks.append(OnRankZero())
    config = tiny_config(root, callbacks, n_epochs=1, train_steps_per_epoch=steps)
    if about == "layout":
        make = partial(DeviceParameters.HSDP, dp_shard=2) if is_last else DeviceParameters.FSDP
        config.device_parameters = make(device="cpu", init_timeout_s=30)
    if about == "short_training":
        config.training_parameters.train_steps_per_epoch = None
    if about == "seed":
        config.seed = None if is_last else 1
    if about == "name" and is_last:
        config.experiment = "mine"
    Dissenter.about = about
    trainer = Dissenter(config)
    counter = Validated()
    trainer.callbacks.append(counter)
    trainer.fit()
    return trainer.global_step, counter.num_batches


class Validated(Callback[TinyTrainer]):
    num_batches = 0

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.num_batches += 1


SAYS = {
    "training": [
        "ranks disagree on TrainingParameters.train_steps_per_epoch:",
        "rank {others}: 2",
        "rank {last}: 3",
    ],
    "layout": [
        "ranks disagree on DeviceParameters.dp_shard:",
        "rank {others}: 'auto'",
        "rank {last}: 2",
    ],
    "callbacks": ["ranks disagree on the callbacks", "'Counts_2: Counts'"],
    "seed": ["ranks disagree on seed:", "rank {others}: 1", "rank {last}: None"],
    "name": ["ranks disagree on the run's name", "/mine'"],
    "shapes": ["parameter model.head.weight:", "rank {others}: '(1, 8)", "rank {last}: '(2, 8)"],
    "frozen": ["ranks disagree on parameter model.embed.bias:", "torch.float32, frozen'"],
    "order": [
        "ranks disagree on the order of the models' parameters:",
        "rank {others}: ['parameter model.embed.weight'",
        "rank {last}: ['parameter model.blocks.0.weight'",
    ],
    "models": ["ranks disagree on parameter extra.weight:", "rank {others}: nothing"],
    "optimizers": ["the optimizers, and the number of parameters in each group", "('SGD', [7])"],
    "metrics": ["ranks disagree on the metrics:", "rank {last}: ('metric',)"],
    "metric_keys": [
        "ranks disagree on the keys of metrics:",
        "rank {others}: ['top1']",
        "rank {last}: ['top5']",
    ],
    "schedulers": ["ranks disagree on the schedulers:", "rank {last}: {{'scheduler': 'StepLR'}}"],
    "no_validation": [
        "ranks disagree on whether there is a validation loader",
        "rank {others}: True",
        "rank {last}: False",
    ],
}
ON_FOUR = ("training", "layout", "callbacks", "shapes")


@pytest.mark.parametrize(
    ("about", "num_ranks"),
    [*((about, 2) for about in SAYS), *((about, 4) for about in ON_FOUR)],
)
def test_an_error_shows_the_different_values_by_rank(
    tmp_path: Path, about: str, num_ranks: int
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(train, num_ranks, str(tmp_path), about)

    others = {2: "0", 4: "0–2"}[num_ranks]
    assert len(caught.value.tracebacks) == num_ranks
    for text in caught.value.tracebacks.values():
        assert "RankDisagreement: ranks disagree on" in text
        for said in SAYS[about]:
            assert said.format(others=others, last=num_ranks - 1) in text


def test_a_rank_zero_callback_may_exist_on_some_ranks_only(tmp_path: Path) -> None:
    assert run_on_ranks(train, 2, str(tmp_path), "rank_zero_callbacks") == [(2, 2)] * 2


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_may_report_different_values(tmp_path: Path, num_ranks: int) -> None:
    assert run_on_ranks(train, num_ranks, str(tmp_path), "results") == [(2, 2)] * num_ranks


@pytest.mark.parametrize("about", ["validation_without_length", "shorter_validation"])
def test_each_rank_validates_to_the_end_of_its_own_loader(tmp_path: Path, about: str) -> None:
    assert run_on_ranks(train, 2, str(tmp_path), about) == [(2, 2), (2, 1)]


@pytest.mark.parametrize(
    ("about", "name"), [("short_training", "training"), ("short_validation", "validation")]
)
def test_a_loader_that_ends_early_on_one_rank_is_an_error_on_all(
    tmp_path: Path, about: str, name: str
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(train, 2, str(tmp_path), about)

    assert len(caught.value.tracebacks) == 2
    for text in caught.value.tracebacks.values():
        assert f"the {name} loader has length" in text.splitlines()[-1]
        assert text.splitlines()[-1].count("rank 1 (pid") == 1
