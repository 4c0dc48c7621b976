"""Rules of retention, without files."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from catalogs import checkpoint, steps

from dream_callbacks.checkpoint.catalog import Checkpoint
from dream_callbacks.checkpoint.retention import KeepRules, best_first, is_among_best, to_delete


def kept(checkpoints: list[Checkpoint], **rules: Any) -> list[int]:
    deleted = {c.name for c in to_delete(checkpoints, KeepRules(**rules))}
    return [c.step for c in checkpoints if c.name not in deleted]


def test_the_newest_are_kept() -> None:
    assert kept(steps(10, 20, 30, 40, 50), last=3) == [30, 40, 50]


def test_none_keeps_all() -> None:
    assert kept(steps(*range(100)), last=None) == list(range(100))


def test_the_best_are_kept_in_addition() -> None:
    values = {10: 5.0, 20: 1.0, 30: 4.0, 40: 2.0, 50: 9.0}
    checkpoints = [checkpoint(step, value) for step, value in values.items()]

    assert kept(checkpoints, last=1, top_k=2) == [20, 40, 50]
    assert kept(checkpoints, last=1, top_k=2, mode="max") == [10, 50]


def test_the_first_of_each_interval_is_kept_in_addition() -> None:
    assert kept(steps(90, 110, 190, 210, 290, 300, 310), last=1, every=100) == [110, 210, 300, 310]


def test_the_kept_intervals_do_not_change_with_later_saves() -> None:
    rules = KeepRules(last=2, every=100)
    checkpoints: list[Checkpoint] = []
    for step in range(7, 1000, 7):
        checkpoints.append(checkpoint(step))
        deleted = {c.name for c in to_delete(checkpoints, rules)}
        checkpoints = [c for c in checkpoints if c.name not in deleted]

    assert [c.step for c in checkpoints] == [105, 203, 301, 406, 504, 602, 700, 805, 903, 987, 994]


@pytest.mark.parametrize("value", [math.nan, None], ids=["nan", "missing"])
def test_nan_and_missing_metrics_are_never_best(value: float | None) -> None:
    checkpoints = [checkpoint(10, value), checkpoint(20, 3.0), checkpoint(30, 4.0)]

    assert kept(checkpoints, last=1, top_k=1) == [20, 30]


@pytest.mark.parametrize("value", [-1.0, 0.0, -math.inf])
def test_negative_zero_and_infinite_metrics_count(value: float) -> None:
    checkpoints = [checkpoint(10, value), checkpoint(20, 3.0), checkpoint(30, 4.0)]

    assert kept(checkpoints, last=1, top_k=1) == [10, 30]
    assert best_first(checkpoints, "val_loss", "min")[0].step == 10


def test_the_newest_of_equal_metrics_is_best() -> None:
    checkpoints = [checkpoint(10, 1.0), checkpoint(20, 1.0), checkpoint(30, 2.0)]

    assert [c.step for c in best_first(checkpoints, "val_loss", "min")] == [20, 10, 30]


def test_the_newest_without_nan_is_kept() -> None:
    checkpoints = [
        checkpoint(10),
        checkpoint(20),
        *(checkpoint(step, has_nan=True) for step in (30, 40, 50)),
    ]

    assert kept(checkpoints, last=2) == [20, 40, 50]


def test_newest_means_written_last_after_resuming_from_an_earlier_step() -> None:
    # Written to step 300, then continued from 100.
    checkpoints = [
        checkpoint(100, seq=1),
        checkpoint(200, seq=2),
        checkpoint(300, seq=3),
        checkpoint(110, seq=4),
    ]

    assert kept(checkpoints, last=2) == [300, 110]


def test_random_rules_keep_the_newest_the_best_and_one_without_nan() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        checkpoints = [
            checkpoint(
                step,
                draw.choice([None, math.nan, math.inf, draw.gauss(0, 1), 0.0]),
                seq=seq,
                has_nan=draw.random() < 0.3,
            )
            for seq, step in enumerate(draw.sample(range(500), draw.randrange(1, 12)))
        ]
        rules = KeepRules(
            last=draw.choice([1, 2, 3, 5]),
            top_k=draw.choice([0, 1, 3]),
            every=draw.choice([None, 50, 100]),
            mode=draw.choice(["min", "max"]),
        )

        deleted = to_delete(checkpoints, rules)

        left = [c for c in checkpoints if c not in deleted]
        assert left[-1] is checkpoints[-1], "the newest"
        assert {c.name for c in checkpoints[-(rules.last or 1) :]} <= {c.name for c in left}
        clean = [c for c in checkpoints if not c.manifest.has_nan]
        assert not clean or clean[-1] in left, "the newest good one"
        best = best_first(checkpoints, "val_loss", rules.mode)
        assert all(c in left for c in best[: rules.top_k])
        assert not to_delete(left, rules), "once is enough"


def test_is_among_best_agrees_with_retention() -> None:
    draw = random.Random(1)
    for _ in range(500):
        values = [draw.choice([None, draw.randrange(5), math.nan]) for _ in range(6)]
        checkpoints = [checkpoint(step + 1, value) for step, value in enumerate(values)]
        rules = KeepRules(last=1, top_k=draw.choice([1, 2, 3]), mode=draw.choice(["min", "max"]))
        value = float(draw.randrange(5))

        expected = checkpoint(99, value)
        best = best_first([*checkpoints, expected], "val_loss", rules.mode)[: rules.top_k]

        assert is_among_best(value, checkpoints, rules) == (expected in best)
    assert not is_among_best(math.nan, [], KeepRules(top_k=3))
    assert not is_among_best(1.0, [], KeepRules(top_k=0))
