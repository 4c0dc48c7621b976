"""The conformance suite of the core, for every callback of this package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from training import make

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointCallback,
    CheckpointParameters,
    ExportCallback,
    LoadPartialCheckpointCallback,
)
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import TinyTrainer
from dream_trainer.testing.conformance import CHECKS, Check

OFTEN = CheckpointParameters(every=Every(steps=2), keep_top_k=1)

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "CheckpointCallback": lambda: CheckpointCallback(OFTEN),
    "AsyncCheckpointCallback": lambda: AsyncCheckpointCallback(OFTEN),
    "ExportCallback": lambda: ExportCallback("model.pt", "torch"),
}


@pytest.mark.parametrize("check", CHECKS, ids=str)
@pytest.mark.parametrize("new", CALLBACKS.values(), ids=CALLBACKS)
def test_callback_conforms(new: Callable[[], Callback], check: Check, tmp_path: Path) -> None:
    check(new, tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = make(tmp_path_factory.mktemp("source"), kind=TinyTrainer, training={"n_epochs": 1})
    trainer.fit()
    return Path(trainer.run_dir)


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_load_partial_conforms(check: Check, tmp_path: Path, source: Path) -> None:
    check(lambda: LoadPartialCheckpointCallback(source), tmp_path, changes_training=True)
