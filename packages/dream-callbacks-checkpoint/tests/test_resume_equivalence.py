"""prove names the first value that a killed and resumed run doesn't share with one that wasn't."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dream_callbacks.checkpoint import CheckpointError
from dream_callbacks.checkpoint.__main__ import main
from dream_callbacks.checkpoint.testing import Difference, prove
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, tiny_config


def exact() -> TinyTrainer:
    return TinyTrainer(tiny_config())


class Forgetful(TinyTrainer):
    """Counts in an attribute that no checkpoint knows of, and goes by it on the last rank."""

    count = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.count += 1
        is_last = self.world.rank == self.world.world_size - 1
        x, y = batch
        return super().training_step((x, y + is_last * self.count / 100), batch_idx)


def forgetful() -> TinyTrainer:
    return Forgetful(tiny_config())


class Restless(TinyTrainer):
    """Draws from a generator that is another one each time."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        return super().training_step((x, y + time.monotonic_ns() % 1000), batch_idx)


def restless() -> TinyTrainer:
    return Restless(tiny_config())


class Meddler(Callback[Any]):
    """Changes a weight of a run that goes on."""

    def post_setup(self) -> None:
        if self.trainer.global_step:
            with torch.no_grad():
                self.trainer.model.head.weight[0, 3] += 1

    after = {"CheckpointCallback"}


def meddled() -> TinyTrainer:
    return TinyTrainer(tiny_config(callbacks=[Meddler()]))


class LateOnRankOne(Callback[Any]):
    """Comes to each step when rank 0 is there for long."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        time.sleep(0.3 * self.trainer.world.rank)


def late() -> TinyTrainer:
    return TinyTrainer(tiny_config(callbacks=[LateOnRankOne()]))


def validating() -> TinyTrainer:
    return TinyTrainer(tiny_config(val_every_n_steps=0, n_epochs=1))


def test_a_trainer_whose_state_is_complete_passes(tmp_path: Path) -> None:
    proof = prove(exact, tmp_path, steps=3)

    proof.check()
    assert (proof.num_steps, proof.stopped_at, proof.num_ranks) == (6, 3, 1)
    assert proof.num_values > 200


def test_what_isnt_in_the_state_is_named_with_rank_and_step(tmp_path: Path) -> None:
    proof = prove(forgetful, tmp_path, steps=3, num_ranks=2)

    assert proof.difference == Difference("result.loss", rank=1, step=4, when="resumed")
    with pytest.raises(AssertionError, match=r"step 4, rank 1: result.loss differs from the unint"):
        proof.check()


def test_ranks_that_come_to_the_kill_at_different_times_are_all_killed(tmp_path: Path) -> None:
    prove(late, tmp_path, steps=1, num_ranks=2).check()

    assert {f.name for f in (tmp_path / "stopped").glob("killed-*")} == {"killed-0", "killed-1"}


def test_a_trainer_that_never_does_the_same_twice_is_told_apart(tmp_path: Path) -> None:
    proof = prove(restless, tmp_path, steps=2)

    assert proof.difference == Difference("result.loss", rank=0, step=1, when="repeated")


def test_a_weight_that_isnt_what_was_saved_is_named(tmp_path: Path) -> None:
    proof = prove(meddled, tmp_path, steps=2)

    assert proof.difference == Difference("models.model.head.weight", 0, 2, "loaded")


def test_what_may_differ_can_be_left_out(tmp_path: Path) -> None:
    ignored = ["result.*", "models.*", "optimizers.*", "*epoch_means*"]

    prove(forgetful, tmp_path, steps=2, ignore=ignored).check()


def test_a_run_that_ends_before_the_kill_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ended before it could be killed in a validation"):
        prove(validating, tmp_path, steps=2, kill_in="validation")


SCRIPT = """
from dream_trainer.testing import TinyTrainer, tiny_config


class Forgetful(TinyTrainer):
    count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        x, y = batch
        return super().training_step((x, y + self.count / 100), batch_idx)


def exact():
    return TinyTrainer(tiny_config())


def forgetful():
    return Forgetful(tiny_config())
"""


def test_the_command_proves_what_a_script_makes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "my_training.py"
    script.write_text(SCRIPT)

    assert main(["prove", f"{script}:exact", "--steps", "2"]) == 0
    assert "are the same, bit for bit" in capsys.readouterr().out
    assert main(["prove", f"{script}:forgetful", "--steps", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["name"] == "result.loss"
    assert main(["prove", str(script)]) == 1
    assert "file.py:function is required" in capsys.readouterr().err
    assert main(["prove", f"{tmp_path}/other.py:exact"]) == 1
    assert f"there is no file {tmp_path}/other.py; give its path" in capsys.readouterr().err
