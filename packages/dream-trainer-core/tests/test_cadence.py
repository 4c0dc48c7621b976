"""Every and Cadence."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from dream_trainer.callbacks import Cadence, Callback, Every
from dream_trainer.testing import TinyTrainer, tiny_config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"Every\(\) never happens; give it steps=…, epochs=… or seconds=…"),
        ({"steps": 0}, r"Every\(steps=0\): a whole number above 0"),
        ({"steps": -1}, r"Every\(steps=-1\)"),
        ({"steps": 1.5}, r"Every\(steps=1.5\): a whole number above 0"),
        ({"steps": True}, r"Every\(steps=True\)"),
        ({"steps": "3"}, r"Every\(steps='3'\)"),
        ({"epochs": 0}, r"Every\(epochs=0\): a whole number above 0"),
        ({"steps": 1, "epochs": float("inf")}, r"Every\(epochs=inf\)"),
        ({"seconds": 0}, r"Every\(seconds=0\): a number above 0"),
        ({"seconds": -0.5}, r"Every\(seconds=-0.5\)"),
        ({"seconds": float("nan")}, r"Every\(seconds=nan\)"),
        ({"seconds": float("inf")}, r"Every\(seconds=inf\)"),
    ],
    ids=str,
)
def test_a_cadence_that_never_happens_is_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Every(**fields)


def test_every_is_a_value() -> None:
    every = Every(steps=3, seconds=0.5)

    assert every == Every(steps=3, seconds=0.5) != Every(steps=3)
    assert {every: 1}[copy.deepcopy(every)] == 1
    assert pickle.loads(pickle.dumps(every)) == every
    with pytest.raises(AttributeError):
        every.steps = 4  # type: ignore[misc]


def test_due_in_steps_is_true_for_multiples() -> None:
    assert [step for step in range(10) if Every(steps=3).due(step)] == [3, 6, 9]


@pytest.mark.parametrize("every", [Every(epochs=1), Every(seconds=1), Every(steps=1, epochs=1)])
def test_due_without_start_needs_steps_alone(every: Every) -> None:
    with pytest.raises(ValueError, match=r"isn't in steps alone; call start\(\)"):
        every.due(1)


def due_steps(cadence: Cadence, steps: Any) -> list[int]:
    return [step for step in steps if cadence.due(step)]


def test_a_cadence_in_steps_is_due_once_at_each_multiple() -> None:
    assert due_steps(Every(steps=3).start(), [0, 1, 2, 3, 3, 3, 4, 5, 6, 6]) == [3, 6]


def test_a_cadence_checked_late_is_due_after_a_passed_multiple() -> None:
    assert due_steps(Every(steps=3).start(), [2, 4, 5, 7, 20, 21]) == [4, 7, 20, 21]


def test_a_cadence_started_later_is_due_at_multiples() -> None:
    assert due_steps(Every(steps=5).start(step=7), range(7, 21)) == [10, 15, 20]


def test_a_cadence_in_epochs() -> None:
    cadence = Every(epochs=2).start(epoch=1)

    assert [epoch for epoch in range(1, 8) if cadence.due(epoch * 10, epoch)] == [2, 4, 6]
    assert not cadence.due(1000)


def test_a_cadence_in_seconds_counts_from_the_last_time() -> None:
    cadence = Every(seconds=0.05).start()
    assert not cadence.due(1)

    time.sleep(0.06)
    assert cadence.due(1)
    assert not cadence.due(1)

    time.sleep(0.06)
    assert cadence.due(1)


def test_of_several_units_the_first_is_due() -> None:
    cadence = Every(steps=10, epochs=1, seconds=0.05).start()
    assert cadence.due(4, 1)
    assert not cadence.due(5, 1)
    assert cadence.due(10, 1)
    assert not cadence.due(11, 1)

    time.sleep(0.06)
    assert cadence.due(12, 1)
    assert not cadence.due(13, 1)


def test_a_cadence_in_a_callback_under_accumulation(tmp_path: Path) -> None:
    class Acts(Callback[Any]):
        def __init__(self) -> None:
            self.at: list[tuple[int, int]] = []

        def pre_fit(self) -> None:
            self.cadence = Every(steps=2).start(self.trainer.global_step)

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.cadence.due(self.trainer.global_step):
                self.at.append((self.trainer.global_step, batch_idx))

    callback = Acts()
    TinyTrainer(tiny_config(tmp_path, [callback], gradient_accumulation_steps=2)).fit()

    assert callback.at == [(2, 3), (4, 7)]
