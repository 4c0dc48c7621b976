"""Non-finite weights end a run; a non-finite mean with finite weights doesn't."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


class Breaks(Callback[TinyTrainer]):
    """Makes a weight NaN, as a step with a bad gradient does."""

    def __init__(self, step: int = 3) -> None:
        self.step = step

    def post_optimizer_step(self, model: Any, optimizer: Any) -> None:
        if self.trainer.global_step == self.step:
            with torch.no_grad():
                self.trainer.model.head.bias.fill_(float("nan"))


class OddOnce(TinyTrainer):
    """Reports a loss that is NaN for one batch, and doesn't train on it."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        return result | ({"loss": torch.tensor(float("nan"))} if batch_idx == 2 else {})


class Epochs(Callback[TinyTrainer]):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.seen.append("train")

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.seen.append("validation")


def test_non_finite_weights_end_the_run_before_post_train_epoch(tmp_path: Path) -> None:
    epochs = Epochs()
    trainer = TinyTrainer(tiny_config(tmp_path, [Breaks(), epochs], n_epochs=2))
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit()

    assert str(caught.value) == (
        "at step 8 (epoch 0), training_step reports loss=nan on average, and weights are no longer "
        "finite: model.embed.weight, model.embed.bias, model.blocks.0.weight and 5 more. "
        "Training has diverged: resume from an earlier checkpoint with a lower learning rate, or "
        "set gradient_clip_val"
    )
    assert epochs.seen == []


def test_validation_detects_it_within_long_epochs(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, [Breaks()], max_steps=8, val_every_n_steps=5)
    with pytest.raises(FloatingPointError, match=r"at step 5 .* validation_step reports val_loss"):
        TinyTrainer(config).fit()


def test_a_non_finite_mean_warns_if_weights_are_finite(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = OddOnce(tiny_config(tmp_path, n_epochs=2))
    with caplog.at_level(logging.WARNING):
        trainer.fit()

    assert trainer.current_epoch == 1
    assert "training_step reports loss=nan on average; all weights are finite" in caplog.text


def break_one_shard(root: str) -> None:
    device = DeviceParameters.FSDP(device="cpu")
    TinyTrainer(tiny_config(root, [Breaks(step=7)], device=device, n_epochs=2)).fit()


def test_a_non_finite_shard_of_one_rank_ends_all(tmp_path: Path) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(break_one_shard, 2, str(tmp_path))

    # In the last step of the epoch; the bias has one element, which rank 0 holds.
    assert "finite: model.head.bias." in caught.value.tracebacks[0]
    for text in caught.value.tracebacks.values():
        assert "FloatingPointError: at step 8 (epoch 0), validation_step reports" in text
