from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dream_callbacks.logging import LoggerCallback, LRLoggerCallback, read_jsonl, series
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class ScheduledTrainer(TinyTrainer):
    def configure_schedulers(self) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.5**step)


class TwoOptimizersTrainer(TinyTrainer):
    """One optimizer with a tensor as learning rate, one with named and unnamed groups."""

    other: torch.optim.Optimizer

    def configure_optimizers(self) -> None:
        rate = torch.tensor(0.25)
        self.optimizer = torch.optim.AdamW(self.model.embed.parameters(), lr=rate)
        groups = [
            {"params": self.model.blocks.parameters(), "name": "blocks"},
            {"params": self.model.head.parameters(), "lr": 0.125},
        ]
        self.other = torch.optim.SGD(groups, lr=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.backward(loss)
        if not self.is_accumulating_gradients:
            self.step(self.optimizer)
            self.step(self.other)
        return {"loss": loss}


def rows(trainer: TinyTrainer) -> list[dict[str, Any]]:
    trainer.fit()
    return read_jsonl(trainer.run_dir)


def test_the_learning_rate_of_a_step_is_the_one_it_used(tmp_path):
    callbacks = [LoggerCallback(1), LRLoggerCallback()]
    trainer = ScheduledTrainer(tiny_config(tmp_path, callbacks, max_steps=4))

    assert series(rows(trainer), "lr") == ([1, 2, 3, 4], [0.01, 0.005, 0.0025, 0.00125])


def test_optimizers_and_groups_have_their_names_in_the_key(tmp_path):
    callbacks = [LoggerCallback(1), LRLoggerCallback()]
    trainer = TwoOptimizersTrainer(tiny_config(tmp_path, callbacks, max_steps=1))
    (row,) = [row for row in rows(trainer) if any(name.startswith("lr") for name in row)]

    assert {name: value for name, value in row.items() if name.startswith("lr")} == {
        "lr/optimizer": 0.25,
        "lr/other/blocks": 0.5,
        "lr/other/1": 0.125,
    }


@pytest.mark.parametrize(
    ("every", "expected"), [(None, [2, 3]), (4, [1, 2, 3, 4]), (1, [1, 2, 3, 4])]
)
def test_the_default_cadence_is_that_of_the_logger(tmp_path, every, expected):
    callbacks = [LRLoggerCallback(every), LoggerCallback(6)]
    trainer = TinyTrainer(
        tiny_config(tmp_path, callbacks, gradient_accumulation_steps=4, n_epochs=2)
    )
    found = rows(trainer)

    assert series(found, "lr")[0] == expected
    if every is None:
        assert series(found, "train/loss")[0] == expected


def test_the_cadence_restarts_in_each_fit_and_in_each_copy(tmp_path):
    callbacks = [LoggerCallback(2), LRLoggerCallback()]
    trainer = TinyTrainer(tiny_config(tmp_path / "a", callbacks, max_steps=3))
    trainer.fit()
    trainer.config.training_parameters.max_steps = 6
    found = rows(trainer)
    copied = TinyTrainer(tiny_config(tmp_path / "b", copy.deepcopy(callbacks), max_steps=4))

    assert series(found, "lr")[0] == [2, 4, 6]
    assert series(rows(copied), "lr")[0] == [2, 4]


def on_ranks(directory):
    config = tiny_config(directory, [LoggerCallback(1), LRLoggerCallback()])
    config.debug = True  # a collective in a hook of rank 0 alone would raise
    return series(rows(TinyTrainer(config)), "lr")[0]


def test_on_two_ranks_rank_zero_logs_it(tmp_path):
    first, _ = run_on_ranks(on_ranks, 2, tmp_path)

    assert first == list(range(1, 9))


def test_a_cadence_below_one_is_rejected():
    with pytest.raises(ValueError, match="log_every_n_train_batches=0"):
        LRLoggerCallback(0)
