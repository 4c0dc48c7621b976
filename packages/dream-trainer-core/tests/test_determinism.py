"""Random state: saved, restored, and initial weights that no layout changes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from dream_trainer.testing import run_on_ranks
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


def test_what_is_drawn_inside_leaves_no_trace() -> None:
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


def test_building_on_meta_leaves_the_generators_where_building_for_real_does() -> None:
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


def test_sharded_weights_are_those_of_one_process() -> None:
    torch.manual_seed(3)
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    model.init()

    for weights in run_on_ranks(sharded_weights, 2):
        for found, expected in zip(weights, model.parameters(), strict=True):
            assert torch.equal(found, expected)
