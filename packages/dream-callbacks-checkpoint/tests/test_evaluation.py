"""Evaluation of checkpoints: the weights of any step, also while another run is training."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Average, scored, steps, tiny
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from training import CALLBACKS, different, directory, make, weights

from dream_callbacks.checkpoint import CheckpointError
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import TinyTrainer, run_on_ranks

VALUES = {0: 9.0, 4: 5.0, 8: 1.0, 12: 3.0, 16: 4.0, 20: 4.0, 24: 4.0}


def run(root: Path, **fields: Any) -> TinyTrainer:
    """A run with checkpoints of steps 4, 8, 12 and 16, of which that of step 8 is the best."""
    return tiny(
        root,
        kind=scored(VALUES),
        every=Every(steps=4),
        training={"val_every_n_steps": 4},
        **fields,
    )


@pytest.fixture
def finished(tmp_path: Path) -> TinyTrainer:
    trainer = run(tmp_path)
    trainer.fit()
    return trainer


@pytest.mark.parametrize(
    ("checkpoint", "step"),
    [("last", 16), ("best", 8), ("max", 4), (12, 12), ("path", 8), ("run", 16)],
)
def test_a_checkpoint_of_a_run_is_evaluated(
    tmp_path: Path, finished: TinyTrainer, checkpoint: Any, step: int
) -> None:
    paths = {"path": directory(tmp_path) / "step-0000000008", "run": str(finished.run_dir)}
    before = copy.deepcopy(weights(finished))

    result = finished.validate(checkpoint=paths.get(checkpoint, checkpoint))

    assert result == {"val_loss": VALUES[step]}, "its step is the trainer's in the meantime"
    assert finished.global_step == 16
    assert not different(weights(finished), before)


def test_the_weights_are_those_that_were_saved(tmp_path: Path) -> None:
    class Remembers(Callback[TinyTrainer]):
        def post_validation_epoch(self, result: dict[str, Any]) -> None:
            losses.setdefault(self.trainer.global_step, []).append(result["val_loss"])

    losses: dict[int, list[float]] = {}
    trainer = tiny(tmp_path, Remembers(), every=Every(epochs=1), n_epochs=3)
    trainer.fit()
    for step in (8, 16):
        trainer.validate(checkpoint=step)

    assert losses[8][0] == losses[8][1] != losses[16][0] == losses[16][1]


def test_test_and_predict_take_a_checkpoint_too(finished: TinyTrainer) -> None:
    val: Any = finished.val_dataloader

    assert finished.test(val, checkpoint="best") == {"val_loss": 1.0}
    first, last = (finished.predict(val, checkpoint=step) for step in (4, 16))
    assert not torch.equal(first[0], last[0])
    assert torch.equal(last[0], finished.predict(val)[0])


def test_a_fresh_trainer_evaluates_the_last_checkpoint(
    tmp_path: Path, finished: TinyTrainer
) -> None:
    trainer = run(tmp_path)

    assert trainer.validate() == {"val_loss": 4.0}
    assert trainer.validate(checkpoint="best") == {"val_loss": 1.0}
    assert trainer.global_step == 16
    trainer.training_parameters.n_epochs = 3
    trainer.fit()
    straight = run(tmp_path / "straight", n_epochs=3)
    straight.fit()
    assert not different(weights(trainer), weights(straight))


def test_a_run_that_starts_afresh_keeps_the_checkpoints_until_it_trains(
    tmp_path: Path, finished: TinyTrainer
) -> None:
    trainer = run(tmp_path, resume_mode=None, n_epochs=1)

    assert trainer.validate() == {"val_loss": 9.0}
    assert trainer.validate(checkpoint="best") == {"val_loss": 1.0}
    assert steps(tmp_path) == [4, 8, 12, 16]
    trainer.fit()
    assert steps(tmp_path) == [4, 8]


def test_evaluating_writes_nothing(tmp_path: Path, finished: TinyTrainer) -> None:
    def files() -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = files()
    finished.validate(checkpoint="best")
    finished.validate()
    run(tmp_path).validate(checkpoint="best")

    assert files() == before


EVALUATES = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_evaluation import run
trainer = run(Path(sys.argv[1]))
trainer.config.experiment = sys.argv[3]
print([trainer.validate(checkpoint=c)["val_loss"] for c in ("last", "best", 4)])
trainer = run(Path(sys.argv[1]))
trainer.config.experiment = sys.argv[3]
trainer.setup()
print(trainer.global_step, trainer.validate(checkpoint="best")["val_loss"])
trainer.fit()
"""


def test_another_process_evaluates_while_the_run_trains(tmp_path: Path) -> None:
    class Asks(Callback[TinyTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 13:
                said.append(
                    subprocess.run(
                        [sys.executable, "-c", EVALUATES, *arguments],
                        capture_output=True,
                        text=True,
                        check=False,
                    )
                )

    said: list[Any] = []
    trainer = run(tmp_path)
    arguments = [str(tmp_path), str(Path(__file__).parent), trainer.experiment]
    trainer.callbacks.append(Asks())
    trainer.fit()

    assert said[0].stdout.split("\n") == ["[3.0, 1.0, 5.0]", "12 1.0", ""], said[0].stderr
    assert "is in use by process" in said[0].stderr, "only `fit` needs the directory for itself"
    assert steps(tmp_path) == [4, 8, 12, 16]


class WiderHead(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.model.head = nn.Linear(8, 1, bias=False)


def test_weights_of_another_model_are_refused(tmp_path: Path, finished: TinyTrainer) -> None:
    trainer = tiny(tmp_path / "other", kind=WiderHead)

    with pytest.raises(
        CheckpointError, match=r"(?s)aren't those of the trainer's models.*head\.bias"
    ):
        trainer.validate(checkpoint=finished.run_dir)


def test_a_checkpoint_that_does_not_exist_is_refused(finished: TinyTrainer) -> None:
    with pytest.raises(CheckpointError, match="asks for step-0000000005"):
        finished.validate(checkpoint=5)
    with pytest.raises(CheckpointError, match="isn't a directory"):
        finished.validate(checkpoint="nowhere")
    assert finished.validate() == {"val_loss": 4.0}


def evaluated_in(root: str, layout: str) -> tuple[float, float]:
    trainer = make(Path(root), kind=TinyTrainer, layout=layout, training={"n_epochs": 2})
    return trainer.validate(checkpoint=8)["val_loss"], trainer.validate()["val_loss"]


@pytest.mark.parametrize(("layout", "num_ranks"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
def test_any_layout_evaluates_what_any_other_saved(
    tmp_path: Path, layout: str, num_ranks: int
) -> None:
    trainer = tiny(tmp_path, every=Every(epochs=1))
    trainer.fit()
    expected = trainer.validate(checkpoint=8)["val_loss"], trainer.validate()["val_loss"]

    for found in run_on_ranks(evaluated_in, num_ranks, str(tmp_path), layout):
        assert found == pytest.approx(expected, rel=1e-5)


# A run that ends in mid-epoch


class Plateau(TinyTrainer):
    def configure_schedulers(self) -> None:
        self.scheduler = ReduceLROnPlateau(self.optimizer, patience=0, factor=0.5, threshold=1.0)


class Early(Callback[Any]):
    """Steps the scheduler, counts results that are no better, and stops."""

    def __init__(self) -> None:
        self.best, self.num_worse = float("inf"), 0

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.trainer.scheduler.step(result["val_loss"])
        self.num_worse = 0 if result["val_loss"] < self.best - 10 else self.num_worse + 1
        self.best = min(self.best, result["val_loss"])
        if self.num_worse == 3:
            self.trainer.stop("no better")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.num_worse = state_dict["best"], state_dict["num_worse"]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_the_last_validation_of_a_run_is_not_in_what_it_saves(tmp_path: Path, kind: str) -> None:
    def train(name: str, max_steps: int) -> tuple[Any, ...]:
        early = Early()
        trainer = tiny(
            tmp_path / name,
            early,
            Average(),
            kind=Plateau,
            callback=kind,
            training={"max_steps": max_steps, "n_epochs": None},
        )
        trainer.fit()
        state = trainer.state_dict()
        rate = trainer.optimizer.param_groups[0]["lr"]
        own = state["trainer"]
        return weights(trainer), rate, own["callbacks"]["Early"], own["counters"]

    straight = train("straight", 22)
    train("stopped", 11)
    resumed = train("stopped", 22)

    assert not different(resumed[0], straight[0])
    assert resumed[1:] == straight[1:]


def test_the_last_validation_of_a_run_is_a_metric_of_its_last_checkpoint(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, training={"max_steps": 11})
    trainer.fit()

    assert trainer.validate(checkpoint="best") == trainer.validate()
    assert trainer.global_step == 11
