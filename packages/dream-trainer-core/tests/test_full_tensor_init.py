"""Initial weights are the same in every layout, whatever initializes them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import SimulatedWorld


def of_rows(weight: Tensor) -> None:
    for row in weight:
        row.normal_()


def of_parts(weight: Tensor) -> None:
    first, second = weight[:2].data, weight.data[2:]
    nn.init.normal_(second)
    nn.init.eye_(first)


def with_mask(weight: Tensor) -> None:
    weight.normal_().mul_(weight.new_ones(weight.shape).tril())


def with_padding(weight: Tensor) -> None:
    weight.normal_()
    weight[1].fill_(0)


INITIALIZERS: dict[str, Callable[[Any], object]] = {
    "trunc_normal_": nn.init.trunc_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "orthogonal_": nn.init.orthogonal_,
    "orthogonal_, wide": lambda weight: nn.init.orthogonal_(weight.T),
    "sparse_": lambda weight: nn.init.sparse_(weight, 0.3),
    "eye_": nn.init.eye_,
    "a padding row": with_padding,
    "rows": of_rows,
    "parts": of_parts,
    "a mask": with_mask,
    "a plain tensor": lambda weight: weight.copy_(torch.rand(weight.shape)),
    "rand_like": lambda weight: weight.data.copy_(torch.rand_like(weight) + torch.ones(7, 5)),
    "numpy": lambda weight: weight.copy_(torch.from_numpy(np.random.rand(7, 5))),
    "random": lambda weight: weight.fill_(random.random()),
}


class EachInitializer(TinyTrainer):
    """Has a weight for each initializer, and numbers drawn in the constructor."""

    def configure_models(self) -> None:
        modules = {str(i): nn.Linear(5, 7, bias=False) for i in range(len(INITIALIZERS))}
        self.model = nn.ModuleDict(modules)  # type: ignore[assignment]
        self.is_built_on_meta = modules["0"].weight.is_meta

    def init_weights(self) -> None:
        modules: Any = self.model
        for module, initialize in zip(modules.values(), INITIALIZERS.values(), strict=True):
            initialize(module.weight)


def initialized(root: str, layout: str) -> tuple[bool, dict[str, Tensor], Tensor]:
    device = getattr(DeviceParameters, layout)(device="cpu")
    trainer = EachInitializer(tiny_config(root, device=device))
    trainer.configure()
    trainer.prepare_models()
    weights = [getattr(p, "full_tensor", lambda p=p: p)() for p in trainer.model.parameters()]
    by_name = {name: w.detach().clone() for name, w in zip(INITIALIZERS, weights, strict=True)}
    return trainer.is_built_on_meta, by_name, torch.rand(3)


def test_sharded_weights_equal_those_of_one_process(tmp_path: Path) -> None:
    [(_, alone, drawn_next)] = run_on_ranks(initialized, 1, str(tmp_path), "SINGLE_DEVICE")
    ranks = run_on_ranks(initialized, 2, str(tmp_path), "FSDP")

    for is_built_on_meta, weights, drawn in ranks:
        assert is_built_on_meta
        assert [name for name in alone if not weights[name].equal(alone[name])] == []
        assert drawn.equal(drawn_next)


def test_no_numbers_are_drawn_on_meta(tmp_path: Path) -> None:
    device = DeviceParameters.FSDP(device="cpu")
    with SimulatedWorld(device, rank=0, world_size=2) as world:
        trainer = EachInitializer(tiny_config(tmp_path, device=device), world=world)
        trainer.configure()
        drawn = torch.rand(3)

    assert trainer.is_built_on_meta
    torch.manual_seed(trainer.config.seed or 0)
    assert drawn.equal(torch.rand(3))
