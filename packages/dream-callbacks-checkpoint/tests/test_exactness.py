"""Stopped and resumed equals never stopped, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training import (
    CALLBACKS,
    CrashAt,
    Everything,
    History,
    PlannedError,
    different,
    make,
    moments,
    weights,
)

from dream_trainer.callbacks import Every
from dream_trainer.testing import run_on_ranks


def finished(
    root: Path, layout: str, crash: CrashAt | None, num_workers: int, accumulation: int, **save: Any
) -> dict[str, Any]:
    """What a run gives that may crash once, and is then started again."""
    Everything.num_workers = num_workers
    history = History()
    training = {"n_epochs": 2, "gradient_accumulation_steps": accumulation}
    if crash is not None:
        with pytest.raises(PlannedError):
            make(root, history, crash, layout=layout, training=training, **save).fit()
    trainer = make(root, history, layout=layout, training=training, **save)
    trainer.fit()
    return {
        "batches": history.batches,
        "epochs": history.epochs,
        "validations": history.validations,
        "weights": weights(trainer),
        "moments": moments(trainer),
        "counters": trainer.counters,
    }


def compare(expected: dict[str, Any], found: dict[str, Any]) -> None:
    assert found["batches"] == expected["batches"]
    assert found["epochs"] == expected["epochs"]
    assert found["validations"] == expected["validations"]
    assert found["counters"] == expected["counters"]
    assert not different(expected["weights"], found["weights"])
    assert not different(expected["moments"], found["moments"])


CRASHES = {
    "mid_epoch": (3, False),
    "epoch_end": (6, False),
    "inside_validation": (6, True),
    "second_epoch": (9, False),
}


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES)
@pytest.mark.parametrize("accumulation", [1, 3], ids=["", "accumulation_3"])
@pytest.mark.parametrize(
    ("callback", "num_workers"),
    [("sync", 0), ("async", 0), ("sync", 2), pytest.param("async", 2, marks=pytest.mark.full)],
)
def test_resumed_equals_never_stopped(
    tmp_path: Path, callback: str, num_workers: int, accumulation: int, crash: tuple[int, bool]
) -> None:
    save = {"every": Every(steps=1), "callback": callback}
    batch, in_validation = crash

    expected = finished(tmp_path / "whole", "single", None, num_workers, accumulation, **save)
    found = finished(
        tmp_path / "stopped",
        "single",
        CrashAt(batch, in_validation=in_validation),
        num_workers,
        accumulation,
        **save,
    )

    compare(expected, found)
    assert len(expected["batches"]) == 12


@pytest.mark.parametrize("crash", CRASHES.values(), ids=CRASHES)
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("callback", CALLBACKS)
def test_resumed_equals_never_stopped_on_two_ranks(
    tmp_path: Path, callback: str, layout: str, crash: tuple[int, bool]
) -> None:
    results = run_on_ranks(both_ways, 2, tmp_path, callback, layout, crash)

    for expected, found in results:
        compare(expected, found)
    first, second = (expected["batches"] for expected, _ in results)
    assert first != second, "the ranks read different data"


def both_ways(root: Path, callback: str, layout: str, crash: tuple[int, bool]) -> tuple[Any, Any]:
    save = {"every": Every(steps=2), "callback": callback}
    batch, in_validation = crash
    return (
        finished(root / "whole", layout, None, 0, 1, **save),
        finished(
            root / "stopped", layout, CrashAt(batch, in_validation=in_validation), 0, 1, **save
        ),
    )
