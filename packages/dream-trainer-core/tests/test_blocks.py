"""Blocks: what is sharded one by one, and parameters that are tied across them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.trainer.mixins.blocks import blocks_of
from dream_trainer.world import SimulatedWorld


class Block(nn.Module):
    """A layer with an MLP in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Residual(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


def blocks() -> list[Block]:
    return [Block(), Block()]


def gpt(*, tied: bool) -> nn.Module:
    model = nn.Module()
    parts = {"wte": nn.Embedding(9, 4), "h": nn.ModuleList(blocks()), "norm": nn.LayerNorm(4)}
    model.transformer = nn.ModuleDict(parts)
    model.head = nn.Linear(4, 9, bias=False)
    if tied:
        parts["wte"].weight = model.head.weight
    return model


def named(**modules: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, module in modules.items():
        model.add_module(name, module)
    return model


def tied_to(layer: nn.Linear) -> nn.Linear:
    tied = nn.Linear(4, 4)
    tied.weight = layer.weight
    return tied


LAYER, TWICE = nn.Linear(4, 4), nn.Linear(4, 4)
MODELS: dict[str, tuple[nn.Module, list[str]]] = {
    "ModuleList": (named(layers=nn.ModuleList(blocks())), ["layers.0", "layers.1"]),
    "ModuleDict": (named(layers=nn.ModuleDict({"a": nn.Linear(4, 4), "b": Block()})), ["layers.b"]),
    "ModuleDict of one class": (
        named(layers=nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(2)})),
        ["layers.0", "layers.1"],
    ),
    "Sequential": (named(layers=nn.Sequential(*blocks())), ["layers.0", "layers.1"]),
    "a model that is a Sequential": (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        ["0", "2"],
    ),
    "stages": (nn.Sequential(nn.Sequential(Block()), nn.Sequential(Block())), ["0.0", "1.0"]),
    "a Sequential with its own forward": (
        named(layers=nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)))),
        ["layers.0", "layers.1"],
    ),
    "layers of different classes": (nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1)), []),
    "a ModuleDict as a namespace": (gpt(tied=False), ["transformer.h.0", "transformer.h.1"]),
    "tied layers": (
        named(layers=nn.ModuleList([LAYER, Block()]), other=tied_to(LAYER)),
        ["layers.1"],
    ),
    "a layer used twice": (named(layers=nn.ModuleList([TWICE, TWICE])), ["layers.0"]),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_blocks_are_found_in_containers(model: nn.Module, expected: list[str]) -> None:
    found = set(blocks_of(model))

    assert [name for name, module in model.named_modules() if module in found] == expected


class Built(TinyTrainer):
    build: Any = None

    def configure_models(self) -> None:
        self.model = type(self).build()


def set_up(trainer_class: type[TinyTrainer], root: Path) -> TinyTrainer:
    device = DeviceParameters.FSDP(device="cpu")
    with SimulatedWorld(device, rank=0, world_size=2) as world:
        trainer = trainer_class(tiny_config(root, device=device), world=world)
        trainer.configure()
        trainer.prepare_models()
        return trainer


def test_tied_parameters_stay_in_one_unit(tmp_path: Path) -> None:
    class Tied(Built):
        @staticmethod
        def build() -> Any:
            return gpt(tied=True)

    model: Any = set_up(Tied, tmp_path).model

    assert model.transformer["wte"].weight is model.head.weight


def test_tied_parameters_in_different_units_are_refused_at_set_up(tmp_path: Path) -> None:
    class Separated(Built):
        @staticmethod
        def build() -> Any:
            return gpt(tied=True)

        def apply_fully_shard(self, config: dict[str, Any]) -> None:
            from torch.distributed.fsdp import fully_shard

            model: Any = self.model
            fully_shard(model.head, **config)
            fully_shard(model, **config)

    message = (
        "model.transformer.wte.weight and model.head.weight are one parameter, and "
        r"apply_fully_shard puts them into different FSDP units; .* fully_shard\(\[module_a"
    )
    with pytest.raises(ValueError, match=message):
        set_up(Separated, tmp_path)


@pytest.mark.parametrize(
    ("modules", "is_warned"),
    [((nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1)), True), ((nn.Linear(4, 4),), False), ((), False)],
    ids=["two layers", "one layer", "blocks"],
)
def test_one_unit_of_several_layers_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, modules: Any, is_warned: bool
) -> None:
    class One(Built):
        @staticmethod
        def build() -> Any:
            parts = modules or (nn.ModuleList(blocks()),)
            return named(**{f"layer{i}": part for i, part in enumerate(parts)})

    set_up(One, tmp_path)

    assert ("it is one FSDP unit: each rank gathers all of its 4 parameters" in caplog.text) == (
        is_warned
    )


def test_a_model_without_forward_is_sharded_by_its_parts(tmp_path: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    class Heads(Built):
        @staticmethod
        def build() -> Any:
            return nn.ModuleDict({"a": nn.Linear(4, 1), "b": Block()})

    model: Any = set_up(Heads, tmp_path).model

    assert [isinstance(part, FSDPModule) for part in model.values()] == [True, True]
    assert all(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
