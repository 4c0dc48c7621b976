"""In a simulated world one process resumes as any of its ranks, without blocking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_callbacks.checkpoint import (
    AsyncCheckpointCallback,
    CheckpointCallback,
    CheckpointError,
    CheckpointParameters,
)
from dream_callbacks.checkpoint.manager import coordination
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.world import SimulatedWorld

FSDP = DeviceParameters.FSDP(device="cpu")


class Sharded(TinyTrainer):
    def init_weights(self) -> None:
        for parameter in self.model.parameters():
            nn.init.normal_(parameter)


@pytest.mark.parametrize("rank", [0, 3])
def test_coordination_assumes_that_simulated_ranks_equal_this_one(rank: int) -> None:
    with SimulatedWorld(FSDP, rank=rank, world_size=4) as world:
        world.launch()
        ranks = coordination(world)

        assert ranks.gather(lambda: rank) == [rank] * 4
        assert ranks.each_without_timeout(lambda: rank) == rank
        assert ranks.on_rank_zero(lambda: "read") == "read"
        assert ranks.via_rank_zero("mine", lambda values: [(i, *values) for i in range(4)]) == (
            rank,
            *["mine"] * 4,
        )
        with pytest.raises(CheckpointError, match=f"rank {rank}: planned"):
            ranks.on_rank_zero(fails)


def fails() -> None:
    raise ValueError("planned")


@pytest.mark.parametrize("callback_class", [CheckpointCallback, AsyncCheckpointCallback])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_simulated_rank_resumes_with_its_part(
    tmp_path: Path, rank: int, callback_class: type[CheckpointCallback]
) -> None:
    saver = Sharded(tiny_config(tmp_path, [CheckpointCallback()], max_steps=2))
    saver.fit()
    files = sorted(tmp_path.rglob("*"))

    config = tiny_config(tmp_path, [callback_class(CheckpointParameters())], device=FSDP)
    with SimulatedWorld(rank=rank, world_size=4) as world:
        trainer = Sharded(config, world=world)
        trainer.setup()

    weight: Any = trainer.model.embed.weight
    assert torch.equal(weight.to_local(), saver.model.embed.weight[2 * rank : 2 * rank + 2])
    assert trainer.global_step == 2
    assert sorted(tmp_path.rglob("*")) == files
