"""Attributes that a trainer doesn't have, would ignore, or that would hide a part of it."""

from __future__ import annotations

import functools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_trainer.callbacks import Callback, CallbackCollection
from dream_trainer.configs import DeviceParameters, LoggingParameters, TrainingParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer import DreamTrainerConfig


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return TinyTrainer(tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("log", "self.log_scalar"),
        ("device", "self.world.device"),
        ("hparams", "self.config"),
        ("manual_backward", r"self.backward\(loss\)"),
        ("should_stop", r"self.stop\(reason\)"),
        ("logger", "LoggerCallback"),
    ],
)
def test_a_name_of_lightning_that_is_missing_says_what_to_write(
    trainer: Any, name: str, advice: str
) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; here: .*{advice}"):
        getattr(trainer, name)
    assert not hasattr(trainer, name)


def test_other_missing_names_are_ordinary_errors(trainer: Any) -> None:
    with pytest.raises(AttributeError, match=r"'TinyTrainer' object has no attribute 'encoder'$"):
        trainer.encoder  # noqa: B018


def test_an_error_in_a_property_is_not_hidden(tmp_path: Path) -> None:
    class Mine(TinyTrainer):
        @property
        def device(self) -> Any:
            return self.config.no_such_field  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="no_such_field"):
        Mine(tiny_config(tmp_path)).device  # noqa: B018


def test_a_trainer_is_not_called(trainer: Any) -> None:
    with pytest.raises(TypeError, match=r"TinyTrainer is a trainer, .* self.model\(…\)"):
        trainer(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", 0, "TinyTrainer.step = 0 would hide the method step"),
        ("stop", False, "hide the method stop"),
        ("validate", nn.Identity(), "hide the method validate"),
        ("seed", 7, r"the seed is set in the config"),
        ("global_step", 3, "only the loop changes global_step"),
        ("should_stop", True, r"nothing would read it; call stop\(reason\)"),
        ("stop_training", True, "nothing would read it"),
        ("world", nn.Identity(), "the trainer's own world is a World; give your attribute another"),
        ("counters", Counter(), "own counters is a Counters"),
        ("running", 0.0, "own running is a str"),
        ("callbacks", [], "own callbacks is a CallbackCollection"),
    ],
)
def test_an_attribute_that_hides_a_part_or_is_ignored_is_refused(
    trainer: Any, name: str, value: Any, message: str
) -> None:
    with pytest.raises(AttributeError, match=message):
        setattr(trainer, name, value)


def test_other_assignments_are_allowed(trainer: Any) -> None:
    trainer.device = torch.device("cpu")
    trainer.encoder = nn.Identity()
    trainer.loader = [1]
    trainer.callbacks = CallbackCollection()
    trainer.training_step = functools.partial(TinyTrainer.training_step, trainer)
    trainer.fit()

    assert trainer.device.type == "cpu"


# Configs


@pytest.mark.parametrize(
    ("config", "name", "meant"),
    [
        (TrainingParameters(), "gradient_clip", "gradient_clip_val"),
        (TrainingParameters(), "n_epoch", "n_epochs"),
        (DeviceParameters(), "param_type", "param_dtype"),
        (LoggingParameters(), "enable", "enabled"),
        (DreamTrainerConfig(), "callback", "callbacks"),
        (DreamTrainerConfig(), "gradient_clip", "training_parameters.gradient_clip_val"),
        (DreamTrainerConfig(), "max_steps", "training_parameters.max_steps"),
    ],
)
def test_assigning_a_misspelt_field_is_refused(config: Any, name: str, meant: str) -> None:
    with pytest.raises(AttributeError, match=f"{name} = 1 would be ignored.*mean {meant}\\?"):
        setattr(config, name, 1)


def test_fields_and_own_attributes_can_be_assigned() -> None:
    config: Any = DreamTrainerConfig()
    config.training_parameters.max_steps = 3
    config.notes = "mine"
    config.training_parameters._mine = 1  # noqa: SLF001  # the user's

    assert pickle.loads(pickle.dumps(config)).notes == "mine"


class Nothing(Callback[Any]):
    """A callback."""


@pytest.mark.parametrize(
    "given",
    [[Nothing()], (Nothing(),), {"Nothing": Nothing()}, CallbackCollection([Nothing()])],
    ids=lambda given: type(given).__name__,
)
def test_callbacks_may_be_given_as_any_collection(given: Any) -> None:
    config = DreamTrainerConfig(callbacks=given)

    assert isinstance(config.callbacks, CallbackCollection)
    assert config.callbacks.keys() == ("Nothing",)
    config.callbacks = []
    assert len(config.callbacks) == 0
    assert config.callbacks is not DreamTrainerConfig().callbacks


@pytest.mark.parametrize("given", [None, Nothing(), "ProgressBar", [3]])
def test_other_values_for_callbacks_are_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"required|not a Callback"):
        DreamTrainerConfig(callbacks=given)


# Models and parameters


class Shared(TinyTrainer):
    """A part of the model has a name too, and the model has two."""

    def configure_models(self) -> None:
        super().configure_models()
        self.head = self.model.head
        self.net = self.model
        self.compiled = torch.compile(self.model, backend="eager")


def test_a_part_of_a_model_is_no_model_of_its_own(tmp_path: Path) -> None:
    trainer = Shared(tiny_config(tmp_path))
    trainer.setup()

    assert list(trainer.named_models()) == ["model"]
    assert list(trainer.state_dict()["models"]) == ["model"]


class TwoWithOneEncoder(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.critic = nn.Sequential(self.model.embed, nn.Linear(8, 1))


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_models_that_share_parameters_are_refused_on_several_ranks(
    tmp_path: Path, layout: str
) -> None:
    from dream_trainer.world import SimulatedWorld

    device = getattr(DeviceParameters, layout)(device="cpu")
    trainer = TwoWithOneEncoder(
        tiny_config(tmp_path, device=device), world=SimulatedWorld(rank=0, world_size=2)
    )

    with pytest.raises(RuntimeError, match=r"model.embed.weight and critic.0.weight are one para"):
        trainer.configure()


def test_a_bare_parameter_is_refused_with_what_to_write(tmp_path: Path) -> None:
    class Temperature(TinyTrainer):
        def configure_optimizers(self) -> None:
            super().configure_optimizers()
            self.log_alpha = nn.Parameter(torch.zeros(1))
            self.alpha_optimizer = torch.optim.Adam([self.log_alpha])

    with pytest.raises(RuntimeError, match=r"self.log_alpha, .* put it into a module that config"):
        Temperature(tiny_config(tmp_path)).setup()


class AssignsItsParts(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.clipped: list[Any] = []
        self.clip_gradients = self.clipped.append  # type: ignore[method-assign]  # allowed: a function


def test_an_assigned_clip_gradients_is_called(tmp_path: Path) -> None:
    trainer = AssignsItsParts(tiny_config(tmp_path, max_steps=2))
    trainer.fit()

    assert trainer.clipped == [trainer.model, trainer.model]


def test_assigning_to_a_property_says_so(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="loss_scale is a property of trainers; give your"):
        TinyTrainer(tiny_config(tmp_path)).loss_scale = 1.0  # type: ignore[misc,assignment]  # wrong
