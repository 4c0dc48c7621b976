"""CallbackCostCallback: attribution to callbacks, and the collection stays unchanged."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dream_callbacks.profile import CallbackCostCallback
from dream_trainer.callbacks import Callback, RankZeroCallback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Slow(Callback):
    """Sleeps 5 ms after a batch, 2 ms before a validation batch."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        time.sleep(0.005)

    def pre_validation_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.002)


class Quick(Callback):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        pass


class Last(RankZeroCallback):
    after: ClassVar[set[type]] = {Callback}

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        time.sleep(0.003)


class First(Callback):
    before: ClassVar[set[type]] = {Callback}

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        pass


def fit(tmp_path: Path, *callbacks: Callback, **training: Any) -> TinyTrainer:
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks, **training))
    trainer.fit()
    return trainer


def test_the_time_of_each_hook_is_attributed_to_its_callback(tmp_path):
    callback = CallbackCostCallback(skip=1)

    fit(tmp_path, Last(), Quick(), Slow(), callback, First())

    costs = callback.costs
    assert next(iter(costs)) == ("Slow", "post_train_step")
    assert costs["Slow", "post_train_step"].num_calls == 7
    assert costs["Slow", "post_train_step"].mean_us >= 5000
    assert costs["Slow", "pre_validation_step"].num_calls == 2
    assert costs["Slow", "pre_validation_step"].mean_us >= 2000
    assert costs["Last", "post_train_step"].mean_us >= 3000
    assert costs["Quick", "post_train_step"].mean_us < 1000
    assert costs["First", "post_train_step"].mean_us < 1000


def test_only_hooks_that_a_callback_has_are_reported(tmp_path):
    callback = CallbackCostCallback(skip=0)

    fit(tmp_path, Slow(), Quick(), callback)

    assert set(callback.costs) == {
        ("Slow", "post_train_step"),
        ("Slow", "pre_validation_step"),
        ("Quick", "post_train_step"),
    }


def test_the_collection_is_the_same_afterwards(tmp_path):
    class Names(Callback):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            self.seen.append(len(self.trainer.callbacks))

    names = Names()
    callbacks = [names, Last(), CallbackCostCallback(skip=2, num_steps=3), First()]
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks))
    before = trainer.callbacks.plan()

    trainer.fit()

    assert trainer.callbacks.plan() == before
    assert names.seen == [4, 4, 9, 9, 9, 4, 4, 4]


def test_the_order_of_callbacks_does_not_change_while_it_measures(tmp_path):
    order: list[str] = []

    class Note(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            order.append(self.name)

    class NoteLast(Note):
        after: ClassVar[set[type]] = {Callback}

    notes = [NoteLast("last"), Note("a"), Note("b")]

    fit(tmp_path, *notes, CallbackCostCallback(skip=2, num_steps=3))

    assert order == ["a", "b", "last"] * 8


def test_the_most_expensive_hooks_are_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    fit(tmp_path, Slow(), Quick(), CallbackCostCallback(skip=1))

    (table,) = [message for message in caplog.messages if "callbacks took" in message]
    assert table.splitlines()[1].split()[:3] == ["Slow.post_train_step", "7", "×"]


def test_an_error_while_measuring_removes_the_clocks(tmp_path):
    class Fail(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                raise ArithmeticError("on purpose")

    trainer = TinyTrainer(tiny_config(tmp_path, [Fail(), CallbackCostCallback(skip=0)]))

    with pytest.raises(ArithmeticError, match="on purpose"):
        trainer.fit()

    assert list(trainer.callbacks.keys()) == ["Fail", "CallbackCostCallback"]


def test_a_second_fit_is_measured_again(tmp_path):
    callback = CallbackCostCallback(skip=2, num_steps=4)
    trainer = fit(tmp_path, Slow(), callback)

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert callback.costs["Slow", "post_train_step"].num_calls == 4


@pytest.mark.parametrize("options", [{"skip": -1}, {"num_steps": 0}], ids=str)
def test_invalid_options_are_rejected(options):
    with pytest.raises(ValueError, match="are required"):
        CallbackCostCallback(**options)


def _measured_on_rank(root_dir: str) -> float:
    callback = CallbackCostCallback(skip=0)
    fit(Path(root_dir), Last(), Quick(), callback)
    return callback.costs["Last", "post_train_step"].mean_us


def test_a_rank_zero_callback_costs_nothing_on_other_ranks(tmp_path):
    first, second = run_on_ranks(_measured_on_rank, 2, str(tmp_path))

    assert first >= 3000
    assert second < 1000
