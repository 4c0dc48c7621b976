"""What CUDA graphs need of the loop, as far as a CPU shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, tiny_config


class Reports(Callback[TinyTrainer]):
    """Keeps the results of the steps and of the epochs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.steps.append(result)

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.steps.append(result)

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.epochs.append(result)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.epochs.append(result)


class Replays(TinyTrainer):
    """Each step writes its loss to the same memory, as a CUDA graph's replays do."""

    def setup(self) -> None:
        self.output = torch.zeros(())
        self.losses: list[float] = []
        super().setup()

    def replay(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        return self.output.copy_(loss.detach())

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.replay(super().training_step(batch, batch_idx)["loss"])}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": self.replay(super().validation_step(batch, batch_idx)["val_loss"])}


def test_results_that_the_next_step_overwrites_are_kept_and_averaged(tmp_path: Path) -> None:
    reports = Reports()
    trainer = Replays(tiny_config(tmp_path, [reports]))
    trainer.fit()

    assert [value.item() for step in reports.steps for value in step.values()] == trainer.losses
    assert reports.epochs == [
        {"loss": pytest.approx(sum(trainer.losses[:8]) / 8)},
        {"val_loss": pytest.approx(sum(trainer.losses[8:]) / 2)},
    ]


def test_a_parameter_that_is_reported_has_its_value_of_each_step(tmp_path: Path) -> None:
    class Scaled(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.register_parameter("scale", nn.Parameter(torch.zeros(())))

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.model.scale.add_(1.0)
            return {"scale": self.model.scale}

    reports = Reports()
    Scaled(tiny_config(tmp_path, [reports], val_every_n_steps=0)).fit()

    assert [step["scale"].item() for step in reports.steps] == list(range(1, 9))
    assert reports.epochs == [{"scale": 4.5}]
