"""MemorySnapshotCallback, with and without a CUDA device."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dream_callbacks.profile import MemorySnapshotCallback
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def test_on_the_cpu_it_warns_once_and_training_continues(tmp_path, caplog):
    trainer = TinyTrainer(tiny_config(tmp_path, [MemorySnapshotCallback(skip=0)], n_epochs=2))

    trainer.fit()

    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "this run is on cpu" in warning.message
    assert trainer.global_step == 16
    assert not (trainer.run_dir / "memory").exists()


def test_unselected_ranks_log_nothing(tmp_path, caplog):
    trainer = TinyTrainer(tiny_config(tmp_path, [MemorySnapshotCallback(ranks=(1,))]))

    trainer.fit()

    assert caplog.records == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": -1}, "skip=-1"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"max_entries": 0}, "at least"),
    ],
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        MemorySnapshotCallback(**options)


@pytest.mark.gpu
@needs_cuda
def test_a_snapshot_of_the_selected_steps_is_written(tmp_path):
    callback = MemorySnapshotCallback(skip=1, num_steps=2)
    config = tiny_config(tmp_path, [callback], device=DeviceParameters(device="cuda"))
    trainer = TinyTrainer(config)

    trainer.fit()

    (snapshot,) = (trainer.run_dir / "memory").iterdir()
    assert snapshot.name == "rank0.step3.pickle"
    assert snapshot.stat().st_size > 1000


@pytest.mark.gpu
@needs_cuda
def test_running_out_of_memory_writes_a_snapshot(tmp_path):
    class Fill(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                torch.empty(1 << 50, device="cuda")

    callback = MemorySnapshotCallback(skip=0, num_steps=None)
    config = tiny_config(tmp_path, [callback, Fill()], device=DeviceParameters(device="cuda"))
    trainer = TinyTrainer(config)

    with pytest.raises(torch.OutOfMemoryError):
        trainer.fit()

    assert [path.name for path in (trainer.run_dir / "memory").iterdir()] == [
        "rank0.step4.out_of_memory.pickle"
    ]
