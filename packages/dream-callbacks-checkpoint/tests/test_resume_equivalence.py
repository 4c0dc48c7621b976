"""prove names the first value in which a killed and resumed run differs."""

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


class WithHiddenState(TinyTrainer):
    """Counts in an attribute that isn't in the state, and uses it on the last rank."""

    count = 0

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.count += 1
        is_last = self.world.rank == self.world.world_size - 1
        x, y = batch
        return super().training_step((x, y + is_last * self.count / 100), batch_idx)


def with_hidden_state() -> TinyTrainer:
    return WithHiddenState(tiny_config())


class Nondeterministic(TinyTrainer):
    """Draws from a generator that is seeded differently each time."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        return super().training_step((x, y + time.monotonic_ns() % 1000), batch_idx)


def nondeterministic() -> TinyTrainer:
    return Nondeterministic(tiny_config())


class ChangesAWeight(Callback[Any]):
    """Changes a weight of a resumed run."""

    def post_setup(self) -> None:
        if self.trainer.global_step:
            with torch.no_grad():
                self.trainer.model.head.weight[0, 3] += 1

    after = {"CheckpointCallback"}


def changed_after_loading() -> TinyTrainer:
    return TinyTrainer(tiny_config(callbacks=[ChangesAWeight()]))


class LateOnRankOne(Callback[Any]):
    """Reaches each step long after rank 0."""

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


def test_a_value_missing_from_the_state_is_named_with_rank_and_step(tmp_path: Path) -> None:
    proof = prove(with_hidden_state, tmp_path, steps=3, num_ranks=2)

    assert proof.difference == Difference("result.loss", rank=1, step=4, when="resumed")
    with pytest.raises(AssertionError, match=r"step 4, rank 1: result.loss differs from the unint"):
        proof.check()


def test_ranks_that_reach_the_kill_at_different_times_are_all_killed(tmp_path: Path) -> None:
    prove(late, tmp_path, steps=1, num_ranks=2).check()

    assert {f.name for f in (tmp_path / "stopped").glob("killed-*")} == {"killed-0", "killed-1"}


def test_a_nondeterministic_trainer_is_distinguished(tmp_path: Path) -> None:
    proof = prove(nondeterministic, tmp_path, steps=2)

    assert proof.difference == Difference("result.loss", rank=0, step=1, when="repeated")


def test_a_weight_that_differs_after_loading_is_named(tmp_path: Path) -> None:
    proof = prove(changed_after_loading, tmp_path, steps=2)

    assert proof.difference == Difference("models.model.head.weight", 0, 2, "loaded")


def test_values_can_be_ignored(tmp_path: Path) -> None:
    ignored = ["result.*", "models.*", "optimizers.*", "*epoch_means*"]

    prove(with_hidden_state, tmp_path, steps=2, ignore=ignored).check()


def test_a_run_that_ends_before_the_kill_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="ended before it could be killed in a validation"):
        prove(validating, tmp_path, steps=2, kill_in="validation")


SCRIPT = """
from dream_trainer.testing import TinyTrainer, tiny_config


class WithHiddenState(TinyTrainer):
    count = 0

    def training_step(self, batch, batch_idx):
        self.count += 1
        x, y = batch
        return super().training_step((x, y + self.count / 100), batch_idx)


def exact():
    return TinyTrainer(tiny_config())


def with_hidden_state():
    return WithHiddenState(tiny_config())
"""


def test_the_command_takes_a_trainer_from_a_script(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "my_training.py"
    script.write_text(SCRIPT)

    assert main(["prove", f"{script}:exact", "--steps", "2"]) == 0
    assert "are the same, bit for bit" in capsys.readouterr().out
    assert main(["prove", f"{script}:with_hidden_state", "--steps", "2", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["difference"]["name"] == "result.loss"
    assert main(["prove", str(script)]) == 1
    assert "file.py:function is required" in capsys.readouterr().err
    assert main(["prove", f"{tmp_path}/other.py:exact"]) == 1
    assert f"there is no file {tmp_path}/other.py; give its path" in capsys.readouterr().err
