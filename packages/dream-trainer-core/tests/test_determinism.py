"""Random state: saved and restored; initial weights that are equal in every layout."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world.determinism import (
    FullTensorRandom,
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


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 6)
        self.register_buffer("noise", torch.randn(5))

    def init(self) -> None:
        nn.init.trunc_normal_(self.embed.weight)
        nn.init.kaiming_uniform_(self.layer.weight)
        nn.init.normal_(self.layer.bias)
        self.noise = torch.randn_like(self.noise)


def test_building_on_meta_advances_generators_as_building_on_the_device() -> None:
    torch.manual_seed(3)
    Model()
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.device("meta"), FullTensorRandom(torch.device("cpu")):
        model = Model()

    assert model.embed.weight.is_meta
    assert torch.equal(torch.rand(3), expected)


def sharded_weights() -> list[torch.Tensor]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    torch.manual_seed(3)
    with torch.device("meta"):
        model = Model()
    fully_shard(model)
    model.to_empty(device="cpu")
    with FullTensorRandom(torch.device("cpu")), torch.no_grad():
        model.init()
    return [p.full_tensor().detach() for p in model.parameters()]  # type: ignore[attr-defined]


def test_sharded_weights_equal_those_of_one_process() -> None:
    torch.manual_seed(3)
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    model.init()

    for weights in run_on_ranks(sharded_weights, 2):
        for found, expected in zip(weights, model.parameters(), strict=True):
            assert torch.equal(found, expected)


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
