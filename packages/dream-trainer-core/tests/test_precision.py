"""Dtypes mean the same in every layout: those of the table in docs/how-to/precision.md."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import pytest
import torch
from reductions import Reductions
from torch import Tensor, nn
from torch.nn import functional as F

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

F32, BF16 = torch.float32, torch.bfloat16

OPTIONS: dict[str, dict[str, torch.dtype]] = {
    "none": {},
    "autocast": {"autocast_dtype": BF16},
    "param": {"param_dtype": BF16},
    "param, reduce": {"param_dtype": BF16, "reduce_dtype": F32},
    "param alone": {"param_dtype": BF16, "autocast_dtype": F32},
}

COLUMNS = ("stored", "in forward", "gradient", "reduced in", "input", "output", "loss")


class Looks(nn.Module):
    """Sees the dtypes in its forward, and whether a position is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 1)
        self.seen: dict[str, Any] = {}

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        self.seen = {"in forward": self.head.weight.dtype, "input": position.dtype}
        self.seen["position"] = position.item()
        for block in self.blocks:
            x = torch.tanh(block(x))
        out: Tensor = self.head(x)
        self.seen["output"] = out.dtype
        return out


class LooksTrainer(TinyTrainer):
    model: Any

    def configure_models(self) -> None:
        self.model = Looks()
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        x, y = batch
        output = self.model(x, torch.tensor([1001.0]))
        loss = F.mse_loss(output, y)
        with Reductions() as reductions:
            self.backward(loss)
        first = self.model.blocks[0].weight
        self.seen = self.model.seen | {
            "stored": first.dtype,
            "gradient": first.grad.dtype,
            "reduced in": next(iter(reductions.dtypes), None),
            "loss": loss.dtype,
        }
        self.step(self.optimizer)
        return {"loss": loss}


def seen(layout: str) -> dict[str, dict[str, Any]]:
    found = {}
    for option, dtypes in OPTIONS.items():
        if layout == "FSDP" or option != "param alone":
            device = getattr(DeviceParameters, layout)(device="cpu", **dtypes)
            with tempfile.TemporaryDirectory() as root:
                config = tiny_config(root, device=device, max_steps=1, val_steps_per_epoch=0)
                trainer = LooksTrainer(config)
                trainer.fit()
            found[option] = trainer.seen
    return found


@functools.cache
def seen_on_ranks(layout: str) -> dict[str, dict[str, Any]]:
    return run_on_ranks(seen, 1 if layout == "SINGLE_DEVICE" else 2, layout)[0]


# stored, in forward, gradient, reduced in, input, output, loss
EXPECTED: dict[tuple[str, str], tuple[torch.dtype | None, ...]] = {
    ("SINGLE_DEVICE", "none"): (F32, F32, F32, None, F32, F32, F32),
    ("SINGLE_DEVICE", "autocast"): (F32, F32, F32, None, F32, BF16, F32),
    ("SINGLE_DEVICE", "param"): (F32, F32, F32, None, F32, BF16, F32),
    ("DDP", "none"): (F32, F32, F32, F32, F32, F32, F32),
    ("DDP", "autocast"): (F32, F32, F32, F32, F32, BF16, F32),
    ("DDP", "param"): (F32, F32, F32, F32, F32, BF16, F32),
    ("FSDP", "none"): (F32, F32, F32, F32, F32, F32, F32),
    ("FSDP", "autocast"): (F32, F32, F32, F32, F32, BF16, F32),
    ("FSDP", "param"): (F32, BF16, F32, BF16, F32, BF16, F32),
    ("FSDP", "param, reduce"): (F32, BF16, F32, F32, F32, BF16, F32),
    ("FSDP", "param alone"): (F32, BF16, F32, BF16, BF16, BF16, F32),
}


@pytest.mark.parametrize(("layout", "option"), EXPECTED)
def test_dtypes_are_those_of_the_table(layout: str, option: str) -> None:
    found = seen_on_ranks(layout)[option]

    assert tuple(found[column] for column in COLUMNS) == EXPECTED[layout, option]
    assert found["position"] == (1000.0 if option == "param alone" else 1001.0)


def test_a_parameter_dtype_without_anything_that_computes_in_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"autocast_dtype=torch\.float32 with dp_shard=1: param"):
        DeviceParameters.DDP(param_dtype=BF16, autocast_dtype=F32)
