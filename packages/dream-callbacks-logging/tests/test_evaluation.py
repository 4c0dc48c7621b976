"""What is logged of several validation sets, of uneven ranks, and outside of `fit`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from dream_callbacks.logging import (
    JSONLinesSink,
    LoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    TensorBoardSink,
    read_jsonl,
    series,
)
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


def samples(num_samples: int, value: float) -> TensorDataset:
    return TensorDataset(torch.zeros(num_samples, 4), torch.full((num_samples, 1), value))


class PerClass:
    """A metric with two values."""

    def __init__(self) -> None:
        self.reset()

    def update(self, y: Any) -> None:
        self.total += y.sum()

    def compute(self) -> Any:
        return torch.stack([self.total, -self.total])

    def reset(self) -> None:
        self.total = torch.zeros(())


class TwoSets(TinyTrainer):
    def configure_metrics(self) -> None:
        self.per_class = PerClass()

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        self.clean, self.noisy = (DataLoader(samples(n, v), 2) for n, v in ((3, 1.0), (4, 2.0)))
        return train, {"clean": self.clean, "noisy": self.noisy}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        y = batch[1]
        self.per_class.update(y)
        return {"val_y": y.mean(), "image": torch.zeros(len(y), 3, 4, 4)}


def made(root: Any, **logger: Any) -> TwoSets:
    logger_callback = LoggerCallback(log_every_n_train_batches=1, **logger)
    callbacks = [logger_callback, MetricLoggerCallback(), MediaLoggerCallback()]
    return TwoSets(tiny_config(root, callbacks, n_epochs=1, num_sanity_val_steps=1))


def test_results_of_several_sets_have_their_names(tmp_path):
    trainer = made(tmp_path, log_every_n_val_batches=1)
    trainer.fit()

    rows = read_jsonl(trainer.run_dir)
    assert series(rows, "val/clean/val_y") == ([8], [1.0])
    assert series(rows, "val/noisy/val_y") == ([8], [2.0])
    assert series(rows, "val/clean/per_class/0") == ([8], [3.0])
    assert series(rows, "val/noisy/per_class/1") == ([8], [-8.0])
    assert series(rows, "val_batch/clean/val_y")[1] == [1.0, 1.0]
    assert series(rows, "val_batch/noisy/val_y")[1] == [2.0, 2.0]
    assert series(rows, "val_batch/index")[1] == [1, 2, 3, 4]
    images = read_jsonl(trainer.run_dir, "images")
    assert [line["name"] for line in images] == ["val/clean/image", "val/noisy/image"]


def test_a_finished_trainer_logs_evaluations_to_its_own_log(tmp_path):
    trainer = made(tmp_path, sinks=[JSONLinesSink(), TensorBoardSink()])
    trainer.fit()
    before = read_jsonl(trainer.run_dir)
    trainer.validate()
    trainer.test(trainer.clean)
    trainer.predict([torch.zeros(2, 4)])

    rows = read_jsonl(trainer.run_dir)
    assert rows[: len(before)] == before
    assert series(rows, "val/clean/val_y") == ([8, 8], [1.0, 1.0])
    assert series(rows, "test/val_y") == ([8], [1.0])
    assert series(rows, "test/per_class/1") == ([8], [-3.0])
    names = [line["name"] for line in read_jsonl(trainer.run_dir, "images")]
    assert names == ["val/clean/image", "val/noisy/image"] * 2 + ["test/image"]
    assert trainer.sinks == ()
    trainer.training_parameters.n_epochs = 2
    trainer.fit()
    assert len(series(read_jsonl(trainer.run_dir), "train/loss")[0]) == 16


def test_a_fresh_trainer_leaves_the_log_of_a_run_alone(tmp_path):
    first = made(tmp_path)
    first.fit()
    log = (first.run_dir / "log.jsonl").read_bytes()
    made(tmp_path).validate()
    second = made(tmp_path)
    second.test({"a": second_loader(), "b": second_loader()})

    assert (first.run_dir / "log.jsonl").read_bytes() == log
    rows = read_jsonl(first.run_dir / "evaluation")
    assert series(rows, "val/clean/val_y") == ([0], [1.0])
    assert series(rows, "test/b/val_y") == ([0], [5.0])


def second_loader() -> Any:
    return DataLoader(samples(3, 5.0), 2)


def test_sinks_are_closed_after_an_error(tmp_path):
    class Fails(TwoSets):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            raise ZeroDivisionError("planned")

    trainer = Fails(tiny_config(tmp_path, [LoggerCallback()]))
    with pytest.raises(ZeroDivisionError):
        trainer.validate()

    assert trainer.sinks == ()
    (end,) = read_jsonl(trainer.run_dir / "evaluation", "end")
    assert end["error"] == "ZeroDivisionError: planned"


class Uneven(TinyTrainer):
    """Rank 0 validates three samples, rank 1 two, one in a batch."""

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        data = TensorDataset(torch.zeros(5, 4), torch.arange(5.0)[:, None])
        return train, self.loader(data, batch_size=2)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"y": batch[1].mean()}


def train_uneven(root: Any) -> Any:
    trainer = Uneven(tiny_config(root, [LoggerCallback(log_every_n_val_batches=1)], n_epochs=1))
    trainer.fit()
    return trainer.run_dir


def test_validation_batches_that_some_ranks_have_are_averaged_over_those(tmp_path):
    run_dir, _ = run_on_ranks(train_uneven, 2, tmp_path)

    rows = read_jsonl(run_dir)
    assert series(rows, "val/y") == ([8], [2.0])
    assert series(rows, "val_batch/y")[1] == [0.5, 2.5, 4.0]
