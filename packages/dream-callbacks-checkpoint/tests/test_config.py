"""CheckpointParameters: accepted values and contradictions."""

from __future__ import annotations

from typing import Any

import pytest

from dream_callbacks.checkpoint import CheckpointParameters
from dream_trainer.callbacks import Every


def test_the_default_saves_every_epoch_and_every_half_hour() -> None:
    assert CheckpointParameters().cadence == Every(epochs=1, seconds=1800)


def test_parameters_of_dream_trainer_1_are_accepted() -> None:
    parameters = CheckpointParameters(
        enable=True,
        root_dir="/checkpoints",
        monitor="val/loss",
        resume_mode="min",
        checkpoint_every_n_val_epochs=1,
        keep_top_k=5,
        strict_load=False,
        model_weights_only=True,
        pin_memory=False,
        resume_data=True,
    )

    assert parameters.cadence is None
    assert parameters.best_mode == "min"


def test_resume_max_ranks_high_values_best() -> None:
    assert CheckpointParameters(resume_mode="max").keep_rules.mode == "max"


def test_resuming_from_the_best_keeps_the_best() -> None:
    assert CheckpointParameters(resume_mode="best").keep_rules.top_k == 1
    assert CheckpointParameters(resume_mode="best", keep_top_k=4).keep_rules.top_k == 4
    assert CheckpointParameters().keep_rules.top_k == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": 0}, "keep_last=0: a whole number of at least 1"),
        ({"keep_last": True}, "keep_last=True"),
        ({"keep_top_k": -1}, "keep_top_k=-1: a whole number of at least 0"),
        ({"keep_every": 1.5}, "keep_every=1.5"),
        ({"checkpoint_every_n_val_epochs": 0}, "at least 1"),
        ({"mode": "low"}, 'mode=\'low\': "min" or "max"'),
        ({"on_save_error": "ignore"}, '"warn" or "raise"'),
        ({"resume_mode": "newest"}, "resume_mode='newest'"),
        ({"resume_mode": -3}, "resume_mode=-3"),
        ({"resume_mode": True}, "resume_mode=True"),
        ({"resume_mode": "min", "mode": "max"}, "contradict each other"),
        ({"every": 100}, "an Every is required"),
        ({"monitor": ""}, "monitor=''"),
        (
            {"every": Every(steps=1), "checkpoint_every_n_train_epochs": 1},
            "every and checkpoint_every_n_train_epochs both say how often",
        ),
        (
            {"checkpoint_every_n_train_epochs": 1, "checkpoint_every_n_val_epochs": 1},
            "both say how often",
        ),
    ],
    ids=str,
)
def test_invalid_parameters_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckpointParameters(**fields)


@pytest.mark.parametrize("mode", ["last", "best", "min", "max", 0, 200, None])
def test_every_resume_mode_is_accepted(mode: Any) -> None:
    assert CheckpointParameters(resume_mode=mode).resume_mode == mode
