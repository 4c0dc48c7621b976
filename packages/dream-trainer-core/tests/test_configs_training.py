"""TrainingParameters: invalid numbers are refused before launch."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path
from typing import Any

import pytest

from dream_trainer.callbacks import Callback
from dream_trainer.configs import TrainingParameters
from dream_trainer.testing import TinyTrainer, tiny_config


def test_the_defaults_train_one_epoch() -> None:
    parameters = TrainingParameters()

    assert (parameters.epoch_limit, parameters.step_limit) == (1, math.inf)
    assert parameters.gradient_accumulation_steps == 1
    assert parameters.num_sanity_val_steps == 0


@pytest.mark.parametrize(
    ("fields", "epochs", "steps"),
    [
        ({"n_epochs": 3}, 3, math.inf),
        ({"max_steps": 5}, math.inf, 5),
        ({"max_time": 60.0}, math.inf, math.inf),
        ({"n_epochs": 3, "max_steps": 5, "max_time": 60}, 3, 5),
        ({"n_epochs": 0}, 0, math.inf),
        ({"max_steps": 0}, math.inf, 0),
    ],
    ids=str,
)
def test_limits(fields: dict[str, Any], epochs: float, steps: float) -> None:
    parameters = TrainingParameters(**fields)

    assert (parameters.epoch_limit, parameters.step_limit) == (epochs, steps)


LOWEST = {
    "n_epochs": 0,
    "max_steps": 0,
    "train_steps_per_epoch": 1,
    "gradient_accumulation_steps": 1,
    "val_steps_per_epoch": 0,
    "val_every_n_steps": 0,
    "num_sanity_val_steps": 0,
}


@pytest.mark.parametrize("name", LOWEST)
def test_counts_have_a_lowest_value(name: str) -> None:
    lowest = LOWEST[name]
    assert getattr(TrainingParameters(**{name: lowest}), name) == lowest

    for value in (lowest - 1, -7, 1.5, "3", True, math.inf):
        expected = f"^{name}={value!r}: a whole number of at least {lowest} is required"
        with pytest.raises(ValueError, match=expected):
            TrainingParameters(**{name: value})


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "num_sanity_val_steps"])
def test_none_is_refused_for_fields_without_that_default(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=None: a whole number of at least"):
        TrainingParameters(**{name: None})


@pytest.mark.parametrize("name", ["max_time", "gradient_clip_val"])
def test_max_time_and_clip_are_above_zero(name: str) -> None:
    assert getattr(TrainingParameters(**{name: 0.5}), name) == 0.5
    assert getattr(TrainingParameters(**{name: 1}), name) == 1

    for value in (0, -1.0, math.nan, "3", True):
        with pytest.raises(ValueError, match=f"^{name}={value!r}: a number above 0 is required"):
            TrainingParameters(**{name: value})


def test_validation_that_would_never_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"val_every_n_steps=11 is more than max_steps=10, so val"):
        TrainingParameters(val_every_n_steps=11, max_steps=10)

    TrainingParameters(val_every_n_steps=10, max_steps=10)
    TrainingParameters(val_every_n_steps=0, max_steps=10)
    TrainingParameters(val_every_n_steps=3, max_steps=0)


def test_fields_are_keywords() -> None:
    with pytest.raises(TypeError):
        TrainingParameters(3)  # type: ignore[misc]
    with pytest.raises(TypeError, match="epochs"):
        TrainingParameters(epochs=3)  # type: ignore[call-arg]


def test_parameters_are_values() -> None:
    parameters = TrainingParameters(n_epochs=3)

    assert copy.deepcopy(parameters) == parameters == pickle.loads(pickle.dumps(parameters))
    assert dataclasses.replace(parameters, n_epochs=4) == TrainingParameters(n_epochs=4)


class Launches(Callback[Any]):
    launched = False

    def pre_launch(self) -> None:
        self.launched = True


def test_a_field_that_was_assigned_later_is_checked_before_anything_is_launched(
    tmp_path: Path,
) -> None:
    callback = Launches()
    trainer = TinyTrainer(tiny_config(tmp_path, [callback]))
    trainer.training_parameters.gradient_accumulation_steps = 0
    with pytest.raises(ValueError, match="gradient_accumulation_steps=0: a whole number"):
        trainer.fit()

    assert not callback.launched
    trainer.training_parameters.gradient_accumulation_steps = 2
    trainer.fit()
    assert callback.launched


def test_an_invalid_assigned_field_is_refused_by_the_trainer(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config.training_parameters.n_epochs = -1

    with pytest.raises(ValueError, match="n_epochs=-1"):
        TinyTrainer(config)
