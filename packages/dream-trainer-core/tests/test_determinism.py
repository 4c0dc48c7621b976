"""Random state: saved and restored; seeds of ranks; deterministic algorithms."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world.determinism import (
    random_state,
    random_state_kept,
    seed_all,
    set_random_state,
)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_seeding_makes_all_generators_repeat() -> None:
    seed_all(7)
    first = draw()
    seed_all(7)

    assert draw() == first


def test_state_is_plain_data_and_restores(tmp_path: Any) -> None:
    state = random_state()
    first = draw()
    torch.save(state, tmp_path / "state.pt")
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))

    assert draw() == first


def test_random_numbers_drawn_inside_have_no_effect_outside() -> None:
    seed_all(7)
    first = draw()
    seed_all(7)
    with random_state_kept():
        draw()

    assert draw() == first


# Seeds per axis, and deterministic mode


class Draws(Callback[TinyTrainer]):
    """Random numbers that each rank draws during training, as dropout does."""

    def pre_fit(self) -> None:
        self.drawn = torch.rand(3).tolist()


def drawn(root: str, device: DeviceParameters, seed: int | None) -> list[float]:
    callback = Draws()
    config = tiny_config(root, [callback], device=device, max_steps=1)
    config.seed = seed
    WithoutTensorParallel(config).fit()
    return callback.drawn


class WithoutTensorParallel(TinyTrainer):
    def apply_tensor_parallel(self, mesh: Any) -> None:
        pass


@pytest.mark.parametrize("seed", [3, None])
def test_ranks_that_read_different_data_draw_different_numbers(
    tmp_path: Any, seed: int | None
) -> None:
    device = DeviceParameters(device="cpu", dp_replicate=1, dp_shard=2, tensor_parallel=2)
    by_rank = run_on_ranks(drawn, 4, str(tmp_path), device, seed)

    assert by_rank[0] == by_rank[1], "they share a part of the data and of the model"
    assert by_rank[2] == by_rank[3]
    assert by_rank[0] != by_rank[2]


def deterministic(root: str) -> tuple[bool, str, str]:
    device = DeviceParameters(device="cpu", deterministic=True)
    TinyTrainer(tiny_config(root, device=device, max_steps=1)).fit()
    try:
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.ones(2))  # has no deterministic algorithm
    except RuntimeError as error:
        refused = str(error)
    return (
        torch.are_deterministic_algorithms_enabled(),
        os.environ["CUBLAS_WORKSPACE_CONFIG"],
        refused,
    )


def test_deterministic_mode_refuses_nondeterministic_operations(tmp_path: Any) -> None:
    [(is_on, cublas, refused)] = run_on_ranks(deterministic, 1, str(tmp_path))

    assert is_on
    assert cublas == ":4096:8"
    assert "put_ does not have a deterministic implementation" in refused
