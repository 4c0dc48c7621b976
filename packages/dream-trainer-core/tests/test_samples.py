"""The number of samples in a batch."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recording import Recorder
from torch.nn.utils.rnn import pack_sequence

from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import WeightedMean
from dream_trainer.trainer.samples import SampleCounter


@dataclass
class Batch:
    name: str
    tokens: Any


class Graph:
    """An object with tensors, as graph libraries have: its leading size counts nodes."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


Pair = namedtuple("Pair", "x y")  # noqa: PYI024  # loaders give plain named tuples

X, Y = torch.zeros(5, 3), torch.zeros(5)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (X, 5),
        ((X, Y), 5),
        ([torch.zeros(3), torch.zeros(3, 9)], 3),
        ({"x": X, "y": Y}, 5),
        (({"x": torch.zeros(4, 1)},), 4),
        (UserDict({"ids": ["a"] * 6, "x": torch.zeros(6)}), 6),
        (Pair(torch.zeros(6), None), 6),
        (Batch("train", torch.zeros(7, 3)), 7),
        (Batch("train", ["id"] * 7), 1),
        ((["id"] * 5, X, Y), 5),
        ({"id": ["id"] * 5, "x": X}, 5),
        (("clean", (X, Y)), 5),
        ((torch.tensor(0.5), X, Y), 5),
        ((0.5, 3, None, b"raw", X), 5),
        ((Graph(torch.zeros(99)), X), 5),
        ([["id"], [], {}, [[X]]], 5),
        (SimpleNamespace(text="a", x=torch.zeros(2, 3)), 2),
        (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged), 2),
        (torch.zeros(0, 3), 0),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_samples_are_counted_along_the_first_tensor(
    batch: Any, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert SampleCounter("MyTrainer", warns=True).count(batch) == expected
    assert len(caplog.records) == (1 if expected == 1 else 0)


def test_arrays_count_as_tensors_do() -> None:
    numpy = pytest.importorskip("numpy")
    batch = {"scale": numpy.float32(2), "id": ["a"] * 4, "x": numpy.zeros((4, 2))}

    assert SampleCounter("MyTrainer", warns=True).count(batch) == 4


@pytest.mark.parametrize(
    "batch",
    [None, [], "text", ["a", "b"], torch.tensor(1.0), Graph(X), {"graph": Graph(X)}],
    ids=lambda value: f"{value!r:.20}",
)
def test_a_batch_without_a_tensor_counts_as_1_with_a_warning(
    batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    counter = SampleCounter("MyTrainer", warns=True)
    assert [counter.count(batch), counter.count(batch)] == [1, 1]

    (record,) = caplog.records
    assert "no tensor or array with a leading dimension was found in a batch" in record.message
    assert "write num_samples(self, batch) in MyTrainer" in record.message


@pytest.mark.parametrize(
    "batch",
    [(X.T.contiguous(), Y), {"x": X, "weights": torch.zeros(10)}, pack_sequence([Y, Y[:2]])],
    ids=["sequence first", "weights of classes", "packed sequences"],
)
def test_different_leading_sizes_are_a_warning_that_names_the_method(
    batch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    counter = SampleCounter("MyTrainer", warns=True)
    first = counter.count(batch)
    counter.count(batch)

    (record,) = caplog.records
    assert f"and the first, {first}, counts as its number of samples" in record.message
    assert "write num_samples(self, batch) in MyTrainer" in record.message


def test_a_difference_that_comes_with_the_last_batch_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counter, classes = SampleCounter("MyTrainer", warns=True), torch.zeros(5)
    counter.count((X, classes))
    counter.count((X[:2], classes))

    (record,) = caplog.records
    assert "(2, 5), and the first, 2, counts" in record.message


def test_one_rank_warns(caplog: pytest.LogCaptureFixture) -> None:
    assert SampleCounter("MyTrainer", warns=False).count("text") == 1
    assert caplog.records == []


def test_a_batch_that_contains_itself_is_looked_through_once() -> None:
    batch: list[Any] = ["id"]
    batch += [batch, X]

    assert SampleCounter("MyTrainer", warns=True).count(batch) == 5


class Uneven(TinyTrainer):
    """Validates batches of 4 and 1 samples, with a loss of 0 and 10 per sample."""

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        return train, [self.batch(torch.zeros(4)), self.batch(torch.full((1,), 10.0))]

    def batch(self, y: torch.Tensor) -> Any:
        return ["id"] * len(y), y

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": batch[1].mean()}


def val_loss_of(trainer_class: type[TinyTrainer], root: Path) -> float:
    recorder = Recorder()
    trainer_class(tiny_config(root, [recorder], max_steps=1)).fit()
    ((result,),) = recorder.arguments["post_validation_epoch"]
    return float(result["val_loss"])


def test_the_mean_is_over_samples_where_texts_come_first(tmp_path: Path) -> None:
    assert val_loss_of(Uneven, tmp_path) == 2.0


def test_num_samples_of_a_trainer_is_used(tmp_path: Path) -> None:
    class Graphs(Uneven):
        def batch(self, y: torch.Tensor) -> Any:
            return Graph(y)

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"val_loss": batch.x.mean()}

        def num_samples(self, batch: Any) -> int:
            return len(batch.x) if isinstance(batch, Graph) else 4

    assert val_loss_of(Graphs, tmp_path) == 2.0


def test_a_step_may_take_its_batch_apart(tmp_path: Path) -> None:
    class Popping(Uneven):
        def batch(self, y: torch.Tensor) -> Any:
            return {"y": y}

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            y = batch.pop("y")
            if len(y) == 4:
                batch["hint"] = torch.zeros(9)
            return {"val_loss": y.mean()}

    recorder = Recorder()
    Popping(tiny_config(tmp_path, [recorder], max_steps=1, num_sanity_val_steps=0)).fit()
    ((result,),) = recorder.arguments["post_validation_epoch"]
    assert result["val_loss"] == 2.0


def test_callbacks_see_the_value_of_a_weighted_mean(tmp_path: Path) -> None:
    class Tokens(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = super().training_step(batch, batch_idx)["loss"]
            return {"loss": WeightedMean(loss, torch.tensor(batch_idx)), "idx": batch_idx}

    recorder = Recorder()
    Tokens(tiny_config(tmp_path, [recorder], n_epochs=1)).fit()

    losses = [result["loss"] for result, _ in recorder.arguments["post_train_step"]]
    assert all(type(loss) is torch.Tensor and not loss.requires_grad for loss in losses)
    expected = sum(i * loss.item() for i, loss in enumerate(losses)) / sum(range(len(losses)))
    ((result,),) = recorder.arguments["post_train_epoch"]
    assert result == {"loss": pytest.approx(expected), "idx": 3.5}
