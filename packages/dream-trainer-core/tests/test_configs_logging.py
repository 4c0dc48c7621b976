"""LoggingParameters: whether a run uses an experiment tracker."""

from __future__ import annotations

from pathlib import Path

from dream_trainer.configs import LoggingParameters, WandbLoggingParameters
from dream_trainer.testing import TinyTrainer, tiny_config


def test_names_of_dream_trainer_1_work() -> None:
    parameters = WandbLoggingParameters(enabled=False)

    assert isinstance(parameters, LoggingParameters)
    assert parameters.enabled is False
    assert WandbLoggingParameters().enabled is True


def test_by_default_no_tracker_is_used(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    assert type(config.logging_parameters) is LoggingParameters

    trainer = TinyTrainer(config)
    trainer.fit()
    trainer.log_scalar("x", 1.0)
    assert trainer.sinks == ()
    assert list(tmp_path.iterdir()) == []
