"""Random numbers of a trainer: untouched by validation, and by other trainers in the process."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Draws(TinyTrainer):
    """Draws from all generators, in training and in validation."""

    def configure_models(self) -> None:
        super().configure_models()
        self.dropout = nn.Dropout(0.5)

    def configure_dataloaders(self) -> Any:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, x.sum(1, keepdim=True))
        shuffled = DataLoader(data, 4, shuffle=True, num_workers=0)
        return shuffled, DataLoader(data, 4, shuffle=True, num_workers=1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        loss = F.mse_loss(self.model(self.dropout(x)), y) * (1 + random.random())
        self.backward(loss)
        self.step(self.optimizer)
        return {"loss": loss}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        noise = torch.rand(()) + random.random()
        return {"val_loss": F.mse_loss(self.model(x + noise), y)}


class DrawsToo(Callback[TinyTrainer]):
    """A callback that samples in the hooks of validation."""

    def pre_validation_epoch(self) -> None:
        torch.rand(3)

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        random.random()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        torch.rand(3)


def weights(trainer: TinyTrainer) -> list[Any]:
    return [
        getattr(value, "full_tensor", lambda value=value: value)().tolist()
        for value in trainer.model.state_dict().values()
    ]


def trained(root: str, device: DeviceParameters | None = None, **training: Any) -> list[Any]:
    config = tiny_config(root, [DrawsToo()], device=device, max_steps=20, **training)
    trainer = Draws(config)
    trainer.fit()
    return weights(trainer)


@pytest.mark.parametrize(
    "training",
    [
        {"val_every_n_steps": 10},
        {"val_every_n_steps": 3, "val_steps_per_epoch": 2},
        {},
        {"num_sanity_val_steps": 3, "val_every_n_steps": 7},
    ],
    ids=["every_10", "every_3", "each_epoch", "sanity"],
)
def test_a_run_trains_the_same_weights_with_and_without_validation(
    tmp_path: Path, training: dict[str, Any]
) -> None:
    assert trained(str(tmp_path), **training) == trained(str(tmp_path), val_every_n_steps=0)


class SharesAGenerator(Draws):
    """Its two loaders draw from one generator of the user's."""

    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        generator = torch.Generator().manual_seed(1)
        return (
            DataLoader(train.dataset, 4, shuffle=True, generator=generator),
            DataLoader(val.dataset, 4, shuffle=True, generator=generator),
        )


def test_a_generator_that_both_loaders_share_is_left_alone_too(tmp_path: Path) -> None:
    def run(every: int) -> list[Any]:
        trainer = SharesAGenerator(tiny_config(tmp_path, max_steps=20, val_every_n_steps=every))
        trainer.fit()
        return weights(trainer)

    assert run(3) == run(0)


def trained_with_fsdp(root: str, every: int) -> list[Any]:
    return trained(root, DeviceParameters.FSDP(device="cpu"), val_every_n_steps=every)


def test_so_it_does_on_several_ranks(tmp_path: Path) -> None:
    with_validation = run_on_ranks(trained_with_fsdp, 2, str(tmp_path), 10)

    assert with_validation == run_on_ranks(trained_with_fsdp, 2, str(tmp_path), 0)


# Several trainers in one process


def made(tmp_path: Path, seed: int, **training: Any) -> Draws:
    config = tiny_config(tmp_path, val_every_n_steps=0, **training)
    config.seed = seed
    return Draws(config)


def alone(tmp_path: Path, seed: int) -> list[Any]:
    trainer = made(tmp_path, seed, max_steps=15)
    trainer.fit()
    return weights(trainer)


def test_two_trainers_that_take_turns_train_as_each_does_alone(tmp_path: Path) -> None:
    both = [made(tmp_path, seed) for seed in (1, 2)]
    for trainer in both:
        trainer.configure()
    for trainer in both:
        trainer.setup()
    for steps in (4, 8, 11, 15):
        for trainer in both:
            trainer.training_parameters.max_steps = steps
            trainer.training_parameters.n_epochs = None
            trainer.fit()

    assert [weights(trainer) for trainer in both] == [alone(tmp_path, seed) for seed in (1, 2)]


def test_a_trainer_inside_another_ones_step_does_not_change_it(tmp_path: Path) -> None:
    class TrainsAnother(Callback[Draws]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                made(tmp_path, 5, max_steps=3).fit()

    outer = made(tmp_path, 1, max_steps=15)
    outer.callbacks.append(TrainsAnother())
    outer.fit()

    assert weights(outer) == alone(tmp_path, 1)


def test_what_a_script_draws_between_two_calls_has_no_effect(tmp_path: Path) -> None:
    trainer = made(tmp_path, 1, max_steps=7)
    trainer.configure()
    torch.rand(5)
    trainer.setup()
    random.random()
    trainer.fit()
    torch.rand(5)
    trainer.training_parameters.max_steps = 15
    trainer.fit()

    assert weights(trainer) == alone(tmp_path, 1)


def test_an_evaluation_leaves_the_scripts_random_numbers_alone(tmp_path: Path) -> None:
    trainer = made(tmp_path, 1, max_steps=7)
    trainer.setup()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = trainer.validate()

    assert torch.equal(torch.rand(2), expected)
    assert trainer.validate() == first, "it draws the same numbers each time"
