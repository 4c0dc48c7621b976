from __future__ import annotations

from typing import Any

import pytest
import torch

from dream_callbacks.logging import (
    LoggerCallback,
    MetricLoggerCallback,
    OpenedSink,
    read_jsonl,
    series,
)
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class ErrorSums:
    """A user-defined metric: `value` of the mean absolute error."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.reset()

    def reset(self) -> None:
        self.total, self.number = 0.0, 0

    def update(self, errors: torch.Tensor) -> None:
        self.total += float(errors.abs().sum())
        self.number += errors.numel()

    def compute(self) -> Any:
        return self.value(torch.tensor(self.total / self.number))


class MetricTrainer(TinyTrainer):
    def configure_metrics(self) -> None:
        self.error = ErrorSums(lambda mean: mean)
        self.by_class = ErrorSums(lambda mean: mean * torch.tensor([1.0, 2.0]))
        self.many = ErrorSums(lambda mean: {"low": mean - 1, "high": [mean + 1, mean + 2]})
        self.matrix = ErrorSums(lambda mean: torch.zeros(40, 40))

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        errors = self.model(x) - y
        for metric in self.named_metrics().values():
            metric.update(errors)
        return {"val_loss": errors.square().mean()}


def rows(directory, *callbacks: Any, sinks: Any = None, **training: Any) -> list[dict[str, Any]]:
    trainer = MetricTrainer(tiny_config(directory, callbacks, **training))
    trainer.fit()
    return read_jsonl(trainer.run_dir)


def names(found: list[dict[str, Any]]) -> set[str]:
    return {name for row in found for name in row if name.startswith("val")}


def test_each_value_of_a_metric_is_logged_under_its_own_name(tmp_path, caplog):
    found = rows(tmp_path, LoggerCallback(), MetricLoggerCallback(), n_epochs=2)

    assert names(found) == {
        "val_loss",
        "val/error",
        "val/by_class/0",
        "val/by_class/1",
        "val/low",
        "val/high/0",
        "val/high/1",
    }
    steps, errors = series(found, "val/error")
    assert steps == [8, 16], "once, and not by each of the two callbacks"
    assert series(found, "val/by_class/1")[1] == pytest.approx([2 * e for e in errors])
    assert caplog.text.count("val/matrix has 1600 values") == 1


class MemorySink(OpenedSink):
    def __init__(self) -> None:
        self.names: list[str] = []

    def log_scalars(self, values: Any, step: int) -> None:
        self.names += values


def test_without_a_logger_scalar_metrics_are_logged_too(tmp_path):
    sink = MemorySink()
    trainer = MetricTrainer(tiny_config(tmp_path, [MetricLoggerCallback()]))
    trainer.add_sink(sink)
    trainer.fit()

    assert sink.names[:3] == ["val/by_class/0", "val/by_class/1", "val/error"]
    assert "val_loss" not in sink.names


def test_torchmetrics_are_logged(tmp_path):
    torchmetrics = pytest.importorskip("torchmetrics")

    class TorchMetricTrainer(TinyTrainer):
        def configure_metrics(self) -> None:
            self.mae = torchmetrics.MeanAbsoluteError()

        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            self.mae.update(self.model(batch[0]), batch[1])
            return super().validation_step(batch, batch_idx)

    callbacks = [LoggerCallback(), MetricLoggerCallback()]
    trainer = TorchMetricTrainer(tiny_config(tmp_path, callbacks))
    trainer.fit()

    assert series(read_jsonl(trainer.run_dir), "val/mae")[0] == [8]


def on_ranks(directory):
    config = tiny_config(directory, [LoggerCallback(), MetricLoggerCallback()])
    config.debug = True  # a collective in a hook of rank 0 alone would raise
    trainer = MetricTrainer(config)
    trainer.fit()
    return series(read_jsonl(trainer.run_dir), "val/by_class/0")[0]


def test_on_two_ranks_rank_zero_logs_them(tmp_path):
    first, _ = run_on_ranks(on_ranks, 2, tmp_path)

    assert first == [8]


def test_a_limit_below_one_is_rejected():
    with pytest.raises(ValueError, match="max_values=0"):
        MetricLoggerCallback(max_values=0)
