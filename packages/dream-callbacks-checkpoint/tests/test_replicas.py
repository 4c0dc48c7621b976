"""One copy is saved for all ranks: it is the first one's, and an error if they differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dream_callbacks.checkpoint import CheckpointCallback, CheckpointParameters
from dream_trainer.callbacks import Callback, Every
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


class Drifts(Callback[TinyTrainer]):
    """Changes a weight on one rank."""

    def post_optimizer_step(self, model: Any, optimizer: Any) -> None:
        if self.trainer.global_step == 2 and self.trainer.world.rank == 1:
            self.trainer.model.head.bias.data += 1e-6


def drift(root: str) -> None:
    parameters = CheckpointParameters(every=Every(steps=2))
    callbacks = [Drifts(), CheckpointCallback(parameters)]
    TinyTrainer(tiny_config(root, callbacks, val_steps_per_epoch=0)).fit()


def test_replicas_that_differ_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(drift, 2, str(tmp_path))

    for text in caught.value.tracebacks.values():
        assert "after step 4, ranks have different values of model.head.bias" in text
    saved = [path.name for path in tmp_path.rglob("step-*")]
    assert saved == ["step-0000000002"]


class Normalizes(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.model.blocks.append(nn.Sequential(nn.BatchNorm1d(8)))


class KeepsLosses(Callback[TinyTrainer]):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.losses.append(result["val_loss"])


def losses(root: str, layout: str, max_steps: int) -> list[float]:
    device, kept = getattr(DeviceParameters, layout)(device="cpu"), KeepsLosses()
    callbacks = [kept, CheckpointCallback()]
    Normalizes(tiny_config(root, callbacks, device=device, n_epochs=2, max_steps=max_steps)).fit()
    return kept.losses


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_running_statistics_resume_exactly(tmp_path: Path, layout: str) -> None:
    straight = run_on_ranks(losses, 2, str(tmp_path / "straight"), layout, 16)
    run_on_ranks(losses, 2, str(tmp_path / "stopped"), layout, 11)
    resumed = run_on_ranks(losses, 2, str(tmp_path / "stopped"), layout, 16)

    assert straight[0] == straight[1]
    assert resumed == [each[-1:] for each in straight]
