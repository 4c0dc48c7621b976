"""BenchmarkCallback on runs with a known minimum duration."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dream_callbacks.profile import BenchmarkCallback, BenchmarkResult
from dream_trainer.callbacks import Callback, CallbackCollection, Every
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import BaseTrainer, BaseTrainerConfig
from dream_trainer.trainer.mixins import SetupMixin


class SleepyTrainer(TinyTrainer):
    """Sleeps `training_s` per batch, `validation_s` per validation batch."""

    training_s = 0.0
    validation_s = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        time.sleep(self.training_s)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        time.sleep(self.validation_s)
        return super().validation_step(batch, batch_idx)


class Scalars(Callback):
    """Adds a sink that remembers what is logged."""

    def __init__(self) -> None:
        self.logged: dict[int, Mapping[str, float]] = {}

    def pre_fit(self) -> None:
        self.trainer.add_sink(self)  # type: ignore[attr-defined]

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.logged[step] = values


def fit(tmp_path: Path, *callbacks: Callback, **training: Any) -> SleepyTrainer:
    trainer = SleepyTrainer(tiny_config(tmp_path, callbacks, **training))
    trainer.fit()
    return trainer


def result_of(callback: BenchmarkCallback) -> BenchmarkResult:
    assert callback.result is not None
    return callback.result


def total_s(result: BenchmarkResult, num_samples: int) -> float:
    return num_samples / result.samples_per_s


def test_skipped_steps_are_not_counted(tmp_path):
    callback = BenchmarkCallback(skip=3)

    fit(tmp_path, callback)

    assert result_of(callback).num_steps == 5


def test_a_step_takes_as_long_as_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(SleepyTrainer, "training_s", 0.01)
    callback = BenchmarkCallback(skip=0)

    fit(tmp_path, callback, gradient_accumulation_steps=2, val_steps_per_epoch=0)

    result = result_of(callback)
    assert result.num_steps == 4
    assert result.p90_s >= result.median_s >= 0.02
    assert total_s(result, num_samples=32) >= 0.08


def test_validation_and_epoch_ends_belong_to_no_step(tmp_path, monkeypatch):
    class SlowEpochEnd(Callback):
        def post_epoch(self) -> None:
            time.sleep(0.3)

    monkeypatch.setattr(SleepyTrainer, "validation_s", 0.15)
    callback = BenchmarkCallback(skip=0)

    started_s = time.perf_counter()
    fit(tmp_path, callback, SlowEpochEnd(), val_every_n_steps=4, n_epochs=2)
    wall_s = time.perf_counter() - started_s

    # Four validations of two batches, two epoch ends.
    assert total_s(result_of(callback), num_samples=64) <= wall_s - 4 * 2 * 0.15 - 2 * 0.3


def test_samples_of_all_ranks_and_tokens_are_counted(tmp_path):
    callback = BenchmarkCallback(skip=0, tokens_per_sample=7)

    started_s = time.perf_counter()
    fit(tmp_path, callback)
    wall_s = time.perf_counter() - started_s

    result = result_of(callback)
    assert result.samples_per_s >= 32 / wall_s
    assert result.tokens_per_s == pytest.approx(7 * result.samples_per_s)


def test_waiting_is_the_time_between_batches(tmp_path, monkeypatch):
    class SlowAfterBatch(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            time.sleep(0.05)

    monkeypatch.setattr(SleepyTrainer, "training_s", 0.05)
    busy, half_busy = BenchmarkCallback(skip=1), BenchmarkCallback(skip=1)

    fit(tmp_path, busy, val_steps_per_epoch=0)
    fit(tmp_path, half_busy, SlowAfterBatch(), val_steps_per_epoch=0)

    assert result_of(busy).waiting_share < 0.4 < result_of(half_busy).waiting_share < 0.7


def test_values_are_logged_at_the_cadence_through_the_trainer(tmp_path):
    scalars = Scalars()
    callback = BenchmarkCallback(skip=1, every=Every(steps=3), tokens_per_sample=2)

    fit(tmp_path, scalars, callback)

    assert list(scalars.logged) == [3, 6]
    assert set(scalars.logged[3]) == {
        "benchmark/step_ms_median",
        "benchmark/step_ms_p90",
        "benchmark/samples_per_s",
        "benchmark/tokens_per_s",
        "benchmark/waiting_share",
        "benchmark/peak_memory_mib",
    }
    assert all(value > 0 for value in scalars.logged[3].values())


def test_the_summary_is_logged_at_the_end(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    callback = BenchmarkCallback(skip=0)

    fit(tmp_path, callback)

    assert f"benchmark: {callback.result}" in caplog.messages
    assert "8 steps, median" in caplog.text


def test_a_run_without_a_measured_step_warns(tmp_path, caplog):
    callback = BenchmarkCallback(skip=100)

    fit(tmp_path, callback)

    assert callback.result is None
    assert "lower skip" in caplog.text


def test_a_second_fit_is_measured_separately(tmp_path):
    callback = BenchmarkCallback(skip=2)
    trainer = fit(tmp_path, callback)

    trainer.training_parameters.n_epochs = 3
    trainer.fit()

    assert result_of(callback).num_steps == 14


def test_peak_memory_includes_allocated_tensors(tmp_path):
    class Allocate(Callback):
        def pre_train_epoch(self) -> None:
            self.block = torch.ones(64 * 2**20 // 4)

    callback = BenchmarkCallback(skip=0)

    fit(tmp_path, callback, Allocate())

    assert result_of(callback).peak_bytes > 64 * 2**20


def test_an_error_in_the_run_is_not_hidden(tmp_path):
    class Fail(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            raise ArithmeticError("on purpose")

    callback = BenchmarkCallback(skip=0)

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, callback, Fail())

    assert callback.result is None


class PlainTrainer(BaseTrainer, SetupMixin):
    """Neither logs nor validates."""

    def configure_models(self) -> None:
        self.model = nn.Linear(4, 1)

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def configure_dataloaders(self) -> Any:
        return [torch.ones(2, 4)] * 6

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = F.mse_loss(self.model(batch), torch.zeros(2, 1))
        self.backward(loss)
        self.step(self.optimizer)
        return {"loss": loss}


def test_a_trainer_without_a_logger_is_measured(tmp_path):
    callback = BenchmarkCallback(skip=0, every=Every(steps=1))
    trainer = PlainTrainer(
        BaseTrainerConfig(root_dir=tmp_path, callbacks=CallbackCollection([callback]))
    )

    trainer.fit()

    assert result_of(callback).num_steps == 6


@pytest.mark.parametrize(
    ("options", "message"), [({"skip": -1}, "skip=-1"), ({"tokens_per_sample": 0}, "at least 1")]
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        BenchmarkCallback(**options)


def _measured_rank(root_dir: str) -> float | None:
    SleepyTrainer.training_s = 0.1
    callback = BenchmarkCallback(skip=0)
    fit(Path(root_dir), callback, max_steps=6, val_steps_per_epoch=0)
    return callback.result and callback.result.samples_per_s


def test_rank_zero_reports_the_samples_of_all_ranks(tmp_path):
    samples_per_s, of_second_rank = run_on_ranks(_measured_rank, 2, str(tmp_path))

    assert of_second_rank is None
    assert samples_per_s is not None
    # A rank's own two samples per step can't be more than 20.
    assert 20 < samples_per_s <= 40
