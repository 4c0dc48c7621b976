from pathlib import Path
from typing import Any

import pytest

from dream_callbacks.summary.eta import EpochProgress, epoch_progress, seconds_left
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import BaseTrainer


class Recorder(Callback[BaseTrainer]):
    """Records the progress after each batch."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.progress: list[EpochProgress] = []
        self.stop_after = stop_after

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.progress.append(epoch_progress(self.trainer))
        if len(self.progress) == self.stop_after:
            self.trainer.stop("enough")


def progress(tmp_path: Path, **training: Any) -> list[EpochProgress]:
    """Progress after each batch of a run with 8 batches per epoch."""
    recorder = Recorder()
    TinyTrainer(tiny_config(tmp_path, [recorder], **training)).fit()
    return recorder.progress


def test_epochs_count_from_one_and_steps_restart_in_each_epoch(tmp_path: Path):
    assert [
        (p.epoch, p.num_epochs, p.steps, p.num_steps) for p in progress(tmp_path, n_epochs=2)
    ] == [(epoch, 2, step, 8) for epoch in (1, 2) for step in range(1, 9)]


def test_accumulated_batches_advance_the_fraction_before_the_step(tmp_path: Path):
    found = progress(tmp_path, gradient_accumulation_steps=3)  # the last step has 2 batches

    assert [p.steps for p in found] == [0, 0, 1, 1, 1, 2, 2, 3]
    assert {p.num_steps for p in found} == {3}
    assert [p.fraction for p in found] == [n / 8 for n in range(1, 9)]


def test_max_steps_shortens_the_last_epoch(tmp_path: Path):
    found = progress(tmp_path, max_steps=10)

    assert [p.num_steps for p in found] == [8] * 8 + [2] * 2
    assert [p.fraction for p in found][-2:] == [0.5, 1.0]
    assert {p.num_epochs for p in found} == {None}


def test_max_steps_counts_optimizer_steps(tmp_path: Path):
    found = progress(tmp_path, max_steps=2, gradient_accumulation_steps=3)

    assert (found[-1].batches, found[-1].num_batches) == (6, 6)
    assert (found[-1].steps, found[-1].num_steps) == (2, 2)


def test_a_run_resumed_in_mid_epoch_continues_its_progress(tmp_path: Path):
    recorder = Recorder(stop_after=3)
    trainer = TinyTrainer(tiny_config(tmp_path, [recorder]))
    trainer.fit()
    trainer.fit()

    assert [p.steps for p in recorder.progress] == list(range(1, 9))


def trained(tmp_path: Path, stop_after: int, **training: Any) -> TinyTrainer:
    trainer = TinyTrainer(tiny_config(tmp_path, [Recorder(stop_after)], **training))
    trainer.fit()
    return trainer


def test_the_remaining_time_includes_batches_and_validations(tmp_path: Path):
    trainer = trained(tmp_path, 3, n_epochs=2)

    seconds = seconds_left(trainer, batches_per_s=2.0, validation_s=10.0, elapsed_s=1.5)

    assert seconds == (16 - 3) / 2 + 2 * 10.0


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"n_epochs": 2}, 13 / 2),
        ({"max_steps": 10}, 7 / 2),
        ({"n_epochs": 1, "max_steps": 10}, 5 / 2),
        ({"n_epochs": 2, "max_time": 5.0}, 3.5),
        ({"n_epochs": 2, "max_time": 900.0}, 13 / 2),
        ({"max_time": 900.0}, 898.5),
        ({"max_time": 1.0}, 0.0),
    ],
    ids=str,
)
def test_the_first_limit_determines_the_remaining_time(
    tmp_path: Path, training: dict[str, Any], expected: float
):
    trainer = trained(tmp_path, 3, **training)

    seconds = seconds_left(trainer, batches_per_s=2.0, validation_s=None, elapsed_s=1.5)

    assert seconds == expected


def test_validations_every_n_steps_are_counted(tmp_path: Path):
    trainer = trained(tmp_path, 3, n_epochs=1, val_every_n_steps=2)

    seconds = seconds_left(trainer, batches_per_s=1.0, validation_s=100.0, elapsed_s=0.0)

    assert seconds == 5 + 2 * 100.0


def test_without_a_speed_the_remaining_time_is_unknown(tmp_path: Path):
    trainer = trained(tmp_path, 3)

    assert seconds_left(trainer, batches_per_s=None, validation_s=None, elapsed_s=0.0) is None
