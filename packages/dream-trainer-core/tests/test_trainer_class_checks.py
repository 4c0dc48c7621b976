"""A trainer's method that would never be called is refused when the class is defined."""

from __future__ import annotations

from typing import Any

import pytest

from dream_trainer.callbacks.callback import HOOKS
from dream_trainer.testing import TinyTrainer
from dream_trainer.trainer import BaseTrainer
from dream_trainer.trainer.class_checks import OPTIONAL
from dream_trainer.trainer.dream import DreamTrainer


def method(self: Any) -> None:
    """Methods of a trainer."""


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("configure_scheduler", "configure_schedulers"),
        ("configure_lr_schedulers", "configure_schedulers"),
        ("init_weight", "init_weights"),
        ("apply_fully_shared", "apply_fully_shard"),
    ],
)
def test_a_misspelt_method_is_refused(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine.{name} would never be called .* mean {meant}\?"):
        type("Mine", (TinyTrainer,), {name: method})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("configure_optimizer", "configure_optimizers"),
        ("configure_model", "configure_models"),
        ("configure_dataloader", "configure_dataloaders"),
        ("train_step", "training_step"),
        ("val_step", "validation_step"),
    ],
)
def test_a_misspelt_required_method_is_refused(name: str, meant: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine.{name} would never be called .* mean {meant}\?"):
        type("Mine", (DreamTrainer,), {name: method})


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("on_train_epoch_end", "is called post_train_epoch here, a hook of callbacks. Move it to"),
        ("on_before_optimizer_step", "is called pre_optimizer_step here"),
        ("validation_epoch_end", "is called post_validation_epoch here"),
        ("train_dataloader", "return the loaders from configure_dataloaders"),
        ("val_dataloader", "return the loaders from configure_dataloaders"),
        ("lr_scheduler_step", "return LRSchedule"),
        ("configure_callbacks", r"DreamTrainerConfig\(callbacks="),
    ],
)
def test_methods_of_lightning_are_refused_with_ours(name: str, advice: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{name} would never be called: .*{advice}"):
        type("Mine", (TinyTrainer,), {name: method})


def test_lightnings_setup_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine.setup has a stage, .*; write configure_… methods"):

        class Mine(TinyTrainer):
            def setup(self, stage: str) -> None: ...  # type: ignore[override]


@pytest.mark.parametrize(("name", "kind"), [("step", "method"), ("seed", "property")])
def test_a_class_attribute_that_hides_a_part_is_refused(name: str, kind: str) -> None:
    with pytest.raises(TypeError, match=f"Mine.{name} = 7 would hide the {kind} {name} of trainer"):
        type("Mine", (TinyTrainer,), {name: 7})


@pytest.mark.parametrize("name", HOOKS)
def test_a_method_named_like_a_hook_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine.{name} would never be called.*Move it to a Callba"):
        type("Mine", (TinyTrainer,), {name: method})


def test_a_helper_may_have_a_similar_name_if_the_method_exists() -> None:
    class Mine(TinyTrainer):
        def configure_schedulers(self) -> None:
            self.configure_scheduler()

        def configure_scheduler(self) -> None: ...

    class Derived(Mine):
        def configure_scheduler(self) -> None: ...

    assert issubclass(Derived, Mine)


def test_other_methods_may_have_any_name() -> None:
    class Mine(TinyTrainer):
        def sample(self) -> None: ...

        def configure_model(self) -> None: ...

        def _init_weight(self) -> None: ...


def test_a_trainer_without_setup_mixin_may_have_such_a_method() -> None:
    class Mine(BaseTrainer):
        def configure_scheduler(self) -> None: ...


@pytest.mark.parametrize("name", OPTIONAL)
def test_every_optional_name_is_a_method(name: str) -> None:
    assert callable(getattr(DreamTrainer, name))
