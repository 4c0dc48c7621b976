"""Rules of resuming, without files."""

from __future__ import annotations

import math
from typing import Any

import pytest
from catalogs import checkpoint, steps

from dream_callbacks.checkpoint import CheckpointError
from dream_callbacks.checkpoint.catalog import Catalog, Checkpoint
from dream_callbacks.checkpoint.retention import Choice, ResumeMode, candidates, recorded_choice


def order(
    mode: ResumeMode, *checkpoints: Checkpoint, damaged: dict[str, str] | None = None
) -> list[int]:
    catalog = Catalog(checkpoints, damaged or {})
    return [c.step for c in candidates(catalog, Choice(mode)).checkpoints]


def test_an_empty_directory_has_no_candidates() -> None:
    assert order("last") == []
    assert order("best") == []


def test_last_means_written_last() -> None:
    assert order("last", *steps(10, 20, 30)) == [30, 20, 10]
    went_back = [checkpoint(10, seq=1), checkpoint(20, seq=2), checkpoint(15, seq=3)]
    assert order("last", *went_back) == [15, 20, 10]


def test_a_checkpoint_with_nan_comes_last_with_a_message() -> None:
    catalog = Catalog((checkpoint(10), checkpoint(20), checkpoint(30, has_nan=True)))

    found = candidates(catalog, Choice("last"))

    assert [c.step for c in found.checkpoints] == [20, 10, 30]
    assert "step-0000000030 has NaN" in found.warnings[0]


def test_a_checkpoint_with_nan_is_used_if_there_is_no_other() -> None:
    assert order("last", checkpoint(30, has_nan=True)) == [30]


def test_best_sorts_by_the_metric() -> None:
    values = {10: 3.0, 20: -math.inf, 30: 1.0, 40: math.nan, 50: None}
    checkpoints = [checkpoint(step, value) for step, value in values.items()]

    assert order("best", *checkpoints) == [20, 30, 10]
    assert order("min", *checkpoints) == [20, 30, 10]
    assert order("max", *checkpoints) == [10, 30, 20]


def test_best_without_the_metric_is_an_error_that_lists_the_metrics() -> None:
    known = checkpoint(10, metrics={"accuracy": 0.5})

    with pytest.raises(CheckpointError, match=r"'val_loss'.*they have accuracy"):
        order("best", known)


def test_a_step_selects_only_its_checkpoint() -> None:
    assert order(20, *steps(10, 20, 30)) == [20]


def test_a_missing_step_is_an_error_that_lists_the_steps() -> None:
    with pytest.raises(CheckpointError, match=r"step-0000000025, which doesn't exist.*10, 20, 30"):
        order(25, *steps(10, 20, 30))


def test_a_damaged_step_is_an_error_that_shows_the_damage() -> None:
    with pytest.raises(CheckpointError, match=r"which is damaged: MANIFEST.json is missing"):
        order(20, *steps(10), damaged={"step-0000000020": "MANIFEST.json is missing"})


def test_a_newer_damaged_checkpoint_is_mentioned() -> None:
    catalog = Catalog(tuple(steps(10, 20)), {"step-0000000015": "old", "step-0000000030": "torn"})

    found = candidates(catalog, Choice("last"))

    assert [c.step for c in found.checkpoints] == [20, 10]
    assert found.warnings == ("step-0000000030: torn; it isn't used",)


def test_only_damaged_checkpoints_are_an_error() -> None:
    with pytest.raises(CheckpointError, match=r"none is intact .step-0000000030: torn"):
        order("last", damaged={"step-0000000030": "torn"})


def chosen(
    which: ResumeMode, metric: str | None = None, direction: Any = None, **newest: Any
) -> Choice:
    catalog = Catalog((checkpoint(10, monitor="old"), checkpoint(20, **newest)))
    return recorded_choice(catalog, which, metric, direction, "which")


def test_the_newest_checkpoint_says_what_best_means() -> None:
    run = {"monitor": "accuracy", "mode": "max"}

    assert chosen("best", **run) == Choice("best", "accuracy", "max", "which")
    assert chosen("best", "accuracy", **run).mode == "max"
    assert chosen("best", direction="min", **run).mode == "min"
    assert chosen("best", "bleu", "min", **run) == Choice("best", "bleu", "min", "which")
    assert chosen("min", "bleu", **run).monitor == "bleu"
    assert chosen("last", monitor="").which == "last"


def test_a_best_whose_meaning_is_unknown_is_an_error() -> None:
    with pytest.raises(CheckpointError, match=r'which="best" needs a metric.*have no metrics'):
        chosen("best", monitor="")
    with pytest.raises(CheckpointError, match=r"by 'bleu'.*recorded whether a low or a high value"):
        chosen("best", "bleu")


def test_a_best_that_may_have_been_deleted_is_mentioned() -> None:
    def warnings(*seqs: int, keeps_best: bool = False) -> tuple[str, ...]:
        found = [checkpoint(seq, 1.0, keeps_best=keeps_best) for seq in seqs]
        return candidates(Catalog(tuple(found)), Choice("best")).warnings

    assert "best of the 2 checkpoints that are left" in warnings(2, 3)[0]
    assert not warnings(1, 2)
    assert not warnings(2, 3, keeps_best=True)


def test_a_damaged_checkpoint_that_may_be_the_best_is_mentioned() -> None:
    found = candidates(Catalog((checkpoint(10, 1.0),), {"step-0000000005": "torn"}), Choice("best"))

    assert found.warnings == ("step-0000000005: torn; it isn't used",)


def test_messages_name_the_argument() -> None:
    for argument, text in (("which", 'which="last"'), ("--", "--last")):
        with pytest.raises(CheckpointError, match=f"or {text}"):
            candidates(Catalog((checkpoint(10),)), Choice("best", argument=argument))
