"""Metrics and logging mixins, and trainers combined from mixins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Recorder
from torch import Tensor

from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import BaseTrainer
from dream_trainer.trainer.mixins import EvalMetricMixin, LoggerMixin, SetupMixin


class MeanError:
    """A user's metric: an object with update, compute and reset."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, prediction: Tensor, target: Tensor) -> None:
        self.total += (prediction - target).abs().sum().item()
        self.count += len(target)

    def compute(self) -> float:
        return self.total / self.count


class WithMetric(TinyTrainer):
    def configure_metrics(self) -> None:
        self.error = MeanError()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.error.update(self.model(batch[0]), batch[1])
        return super().validation_step(batch, batch_idx)


def test_metrics_are_reset_computed_and_part_of_the_result(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = WithMetric(tiny_config(tmp_path, [recorder], n_epochs=2))
    trainer.fit()

    assert dict(trainer.named_metrics()) == {"error": trainer.error}
    assert trainer.error.count == 8  # of the last run only
    results = [result for (result,) in recorder.arguments["post_validation_epoch"]]
    assert [set(result) for result in results] == [{"val_loss", "error"}] * 2
    assert results[1]["error"] == trainer.error.compute()


def test_a_metric_with_the_name_of_a_result_is_an_error(tmp_path: Path) -> None:
    class Clashing(WithMetric):
        def configure_metrics(self) -> None:
            self.val_loss = self.error = MeanError()

    with pytest.raises(ValueError, match=r"'val_loss' is reported by validation_step, and is the"):
        Clashing(tiny_config(tmp_path, n_epochs=1)).fit()


def test_torchmetrics_work_unchanged(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class WithCollection(TinyTrainer):
        def configure_metrics(self) -> None:
            self.metrics = torchmetrics.MetricCollection(
                {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}
            )

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            self.metrics.update(self.model(batch[0]), batch[1])
            return super().validation_step(batch, batch_idx)

    recorder = Recorder()
    trainer = WithCollection(tiny_config(tmp_path, [recorder]))
    trainer.fit()

    ((result,),) = recorder.arguments["post_validation_epoch"]
    assert result["mse"].item() == pytest.approx(result["val_loss"], rel=1e-5)
    assert list(trainer.named_models()) == ["model"]


class MemorySink:
    """Records logged values."""

    def __init__(self) -> None:
        self.scalars: list[tuple[dict[str, float], int]] = []

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.scalars.append((dict(values), step))


def test_logged_values_reach_every_sink_as_numbers(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    first, second = MemorySink(), MemorySink()
    trainer.log_scalar("before", 1.0)
    trainer.add_sink(first)  # type: ignore[arg-type]
    trainer.add_sink(second)  # type: ignore[arg-type]
    trainer.log_scalar("loss", torch.tensor(2.0))
    trainer.remove_sink(first)  # type: ignore[arg-type]
    trainer.log_dict({"a": 1, "b": 2.0}, step=7)

    assert first.scalars == [({"loss": 2.0}, 0)]
    assert second.scalars == [({"loss": 2.0}, 0), ({"a": 1.0, "b": 2.0}, 7)]
    assert trainer.sinks == (second,)


@pytest.mark.parametrize(
    "bases",
    [
        (BaseTrainer, SetupMixin),
        (SetupMixin, BaseTrainer),
        (BaseTrainer, SetupMixin, EvalMetricMixin),
        (LoggerMixin, EvalMetricMixin, SetupMixin, BaseTrainer),
    ],
    ids=lambda bases: "+".join(base.__name__ for base in bases),
)
def test_mixins_can_be_combined_in_any_order(tmp_path: Path, bases: tuple[type, ...]) -> None:
    own = {
        name: value
        for name, value in vars(TinyTrainer).items()
        if name.startswith(("configure", "training_step", "validation_step", "_loader"))
    }
    trainer = type("Composed", bases, own)(tiny_config(tmp_path, max_steps=2))
    trainer.fit()

    assert trainer.global_step == 2


def test_a_trainer_may_derive_from_a_protocol(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.stateful import Stateful

    class Both(TinyTrainer, Stateful):  # type: ignore[misc]
        pass

    trainer = Both(tiny_config(tmp_path))
    assert isinstance(trainer, Stateful)
    assert not isinstance(3, TinyTrainer)
