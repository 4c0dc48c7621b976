"""Replicas that differ are an error; all ranks evaluate and save the first one's buffers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer.replicas import refuse_different_replicas
from dream_trainer.world import World


class Noise(Callback[TinyTrainer]):
    """Changes a gradient by a number that differs between ranks."""

    def __init__(self, step: int) -> None:
        self.step = step

    def pre_optimizer_step(self, model: Any, optimizer: Any) -> None:
        if self.trainer.global_step == self.step:
            gradient = self.trainer.model.blocks[1].weight.grad
            assert gradient is not None
            gradient += torch.rand(())


class Normalizes(TinyTrainer):
    def configure_models(self) -> None:
        super().configure_models()
        self.model.blocks.append(nn.Sequential(nn.BatchNorm1d(8)))


class KeepsResults(Callback[TinyTrainer]):
    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.result = result


def fit(root: str, layout: str, noise_at: int) -> tuple[float, list[float]]:
    device, kept = getattr(DeviceParameters, layout)(device="cpu"), KeepsResults()
    trainer = Normalizes(tiny_config(root, [Noise(noise_at), kept], device=device))
    trainer.fit()
    mean: Any = trainer.model.blocks[2][0].running_mean  # type: ignore[index]
    return kept.result["val_loss"], mean.tolist()


@pytest.mark.parametrize("noise_at", [0, 3], ids=["first step", "before a validation"])
def test_the_first_parameter_that_differs_between_replicas_is_named(
    tmp_path: Path, noise_at: int
) -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(fit, 2, str(tmp_path), "DDP", noise_at)

    for text in caught.value.tracebacks.values():
        assert "ranks have different values of model.blocks.1.weight" in text
        assert f"after step {1 if noise_at == 0 else 8}, ranks" in text


@pytest.mark.parametrize("layout", ["DDP", "FSDP"])
def test_all_ranks_evaluate_with_the_running_statistics_of_the_first(
    tmp_path: Path, layout: str
) -> None:
    (loss, mean), (other_loss, other_mean) = run_on_ranks(fit, 2, str(tmp_path), layout, -1)

    assert mean == other_mean
    assert loss == other_loss


def compared(values: list[dict[str, Any]], shape: dict[str, int]) -> str:
    """The error about a model whose parameters have other values on each rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    device = DeviceParameters(device="cpu", **shape)
    world = World(device)
    world.launch()
    model = nn.Module()
    for name, value in values[world.rank].items():
        if name.startswith("shard"):
            mesh = world.get_mesh("dp_replicate", "dp_shard")
            value = DTensor.from_local(value, mesh, [Replicate(), Shard(0)])
        model.register_parameter(name, nn.Parameter(value, requires_grad=False))
    try:
        refuse_different_replicas({"net": model}, world, "now")
    except RuntimeError as error:
        return str(error)
    finally:
        world.shutdown()
    return "equal"


NAN = torch.tensor([math.nan, 1.0])
LARGE = torch.arange(5000.0).view(50, 100)
DIFFERENT = {
    "one bit": (LARGE, LARGE.nextafter(torch.where(LARGE == 4998, 2 * LARGE, LARGE))),
    "the sign of zero": (torch.zeros(3), -torch.zeros(3)),
    "two bytes": (torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16) * 2),
    "swapped": (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    "complex": (torch.tensor([1j]), torch.tensor([1.0 + 0j])),
    "bool": (torch.tensor([True]), torch.tensor([False])),
}


def all_compared() -> dict[str, str]:
    equal = {"a": NAN, "b": torch.empty(0), "c": torch.tensor(1.0), "d": LARGE.t()[1:]}
    found = {}
    for name, (first, second) in DIFFERENT.items():
        values = [equal | {"z": first}, equal | {"z": second}]
        found[name] = compared(values, {})
    return found | {"equal": compared([equal, equal], {})}


def test_any_difference_is_found_and_equal_tensors_are_equal() -> None:
    for found in run_on_ranks(all_compared, 2):
        assert found.pop("equal") == "equal"
        for name, message in found.items():
            assert "different values of net.z, and maybe" in message, name


def test_shards_are_compared_with_their_copies_alone() -> None:
    parts = [torch.full((2,), float(i)) for i in range(2)]
    shape = {"dp_replicate": 2, "dp_shard": 2}
    equal = [{"shard": parts[0]}, {"shard": parts[1]}] * 2
    different = [*equal[:3], {"shard": parts[0]}]

    assert run_on_ranks(compared, 4, equal, shape) == ["equal"] * 4
    for message in run_on_ranks(compared, 4, different, shape):
        assert "different values of net.shard" in message


def test_a_trainer_may_let_replicas_differ(tmp_path: Path) -> None:
    """As local SGD does between its averages."""
    assert len(run_on_ranks(fit_apart, 2, str(tmp_path))) == 2


class Apart(TinyTrainer):
    def synchronize_replicas(self) -> None:
        """They are averaged later."""


def fit_apart(root: str) -> int:
    trainer = Apart(tiny_config(root, [Noise(0)], val_steps_per_epoch=0))
    trainer.fit()
    return trainer.global_step
