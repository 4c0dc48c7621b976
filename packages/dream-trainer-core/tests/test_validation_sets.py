"""Several validation sets by name: one run, with results for each; and what ranks exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


def samples(values: list[float]) -> TensorDataset:
    return TensorDataset(torch.zeros(len(values), 4), torch.tensor(values)[:, None])


class Largest:
    """A metric: the largest y."""

    def __init__(self) -> None:
        self.reset()

    def update(self, y: torch.Tensor) -> None:
        self.value = max(self.value, float(y.max()))

    def compute(self) -> float:
        return self.value

    def reset(self) -> None:
        self.value = -1.0


class Sets(TinyTrainer):
    def configure_metrics(self) -> None:
        self.largest = Largest()

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        self.names: list[tuple[str | None, int]] = []
        return train, {
            "clean": DataLoader(samples([0.0, 1.0, 5.0]), 2),
            "noisy": DataLoader(samples([2.0, 2.0, 2.0, 4.0]), 2),
        }

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.names.append((self.validation_set, batch_idx))
        self.largest.update(batch[1])
        return {"val_loss": batch[1].mean()}


class Results(Callback[Any]):
    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []
        self.sets: list[str | None] = []

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.sets.append(self.trainer.validation_set)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.results.append(result)
        self.sets.append(self.trainer.validation_set)


def test_each_set_has_its_means_and_metrics(tmp_path: Path) -> None:
    results = Results()
    trainer = Sets(tiny_config(tmp_path, [results], n_epochs=1))
    trainer.fit()

    assert results.results == [
        {
            "clean/val_loss": 2.0,
            "clean/largest": 5.0,
            "noisy/val_loss": 2.5,
            "noisy/largest": 4.0,
        }
    ]
    assert trainer.names == [("clean", 0), ("clean", 1), ("noisy", 0), ("noisy", 1)]
    assert results.sets == ["clean", "clean", "noisy", "noisy", None]
    assert trainer.num_val_batches == 4


def test_hooks_of_the_epoch_are_called_once(tmp_path: Path) -> None:
    recorder = Recorder()
    Sets(tiny_config(tmp_path, [recorder], n_epochs=1, num_sanity_val_steps=1)).fit()

    assert recorder.events.count("pre_validation_epoch") == 1
    assert recorder.events.count("post_validation_epoch") == 1
    assert recorder.events.count("post_validation_step") == 2 + 4


def test_limits_are_for_each_set(tmp_path: Path) -> None:
    class Sees(Callback[Sets]):
        def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
            seen.append((self.trainer.is_sanity_validating, self.trainer.num_val_batches))

    seen: list[tuple[bool, int | None]] = []
    trainer = Sets(
        tiny_config(tmp_path, [Sees()], n_epochs=1, val_steps_per_epoch=1, num_sanity_val_steps=5)
    )
    trainer.fit()

    assert trainer.names == [("clean", 0), ("noisy", 0)] * 2
    assert seen == [(True, 2)] * 2 + [(False, 2)] * 2


def test_metrics_of_a_sanity_validation_are_reset(tmp_path: Path) -> None:
    trainer = Sets(tiny_config(tmp_path, n_epochs=1, num_sanity_val_steps=5, val_every_n_steps=0))
    trainer.fit()

    assert trainer.largest.value == -1.0


def given(sets: Any) -> type[TinyTrainer]:
    class Given(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return super().configure_dataloaders()[0], sets

    return Given


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({}, "there are no validation loaders in the dict"),
        ({1: [torch.zeros(1)]}, "a validation loader has the name 1; names are strings"),
        ({"a": 3}, "the validation 'a' loader, of type int, can't be iterated over"),
        ({"a": []}, r"the validation 'a' loader \(list\) is empty"),
    ],
    ids=["none", "number", "no_loader", "empty"],
)
def test_sets_that_cannot_be_evaluated_are_refused(tmp_path: Path, sets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given(sets)(tiny_config(tmp_path)).setup()


class OtherNames(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        return train, {f"set {self.world.rank}": val}


def set_up(root: str) -> None:
    OtherNames(tiny_config(root)).setup()


def test_ranks_must_have_the_same_sets(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="disagree on the names of the validation loaders"):
        run_on_ranks(set_up, 2, str(tmp_path))


# On ranks


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def collectives_of(root: str, lengths: tuple[int, ...]) -> int:
    class Long(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            batch = (torch.zeros(2, 4), torch.zeros(2, 1))
            return train, [batch] * lengths[self.world.rank]

    trainer = Long(tiny_config(root, device=DeviceParameters.DDP(device="cpu")))
    trainer.setup()
    trainer.requests.start()
    counter = Collectives()
    with counter:
        trainer.validate()
    return counter.num_calls


def test_ranks_that_know_their_lengths_exchange_nothing_between_batches(tmp_path: Path) -> None:
    short, long, uneven, without = (
        run_on_ranks(collectives_of, 2, str(tmp_path), lengths)[0]
        for lengths in ((2, 2), (60, 60), (60, 2), (60, 0))
    )

    # Some are exchanges of requests, one a second; a rank without any batch is sent one.
    assert max(long, uneven, without) < short + 30, "60 batches, none with an exchange of its own"


class StopsOnRank(Callback[Any]):
    """Rank 1 asks to stop while it has batches and rank 0 has none."""

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.num_batches = batch_idx + 1
        if self.trainer.world.rank == 1 and batch_idx == 2:
            self.trainer.stop("rank 1 has seen enough")


def stopped_while_uneven(root: str) -> tuple[Any, int]:
    import time

    class Slow(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            train, _ = super().configure_dataloaders()
            batch = (torch.zeros(2, 4), torch.zeros(2, 1))
            return train, [batch] * (1 if self.world.rank == 0 else 1000)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            time.sleep(0.02)
            return super().validation_step(batch, batch_idx)

    stops = StopsOnRank()
    config = tiny_config(root, [stops], device=DeviceParameters.FSDP(device="cpu"), n_epochs=3)
    trainer = Slow(config)
    trainer.fit()
    return trainer.stop_reason, stops.num_batches


def test_a_stop_ends_the_filler_steps_too(tmp_path: Path) -> None:
    (reason, num_first), (other, num_second) = run_on_ranks(stopped_while_uneven, 2, str(tmp_path))

    assert reason == other == "rank 1 has seen enough"
    assert num_first == 1
    assert num_second < 300, "about a second later"
