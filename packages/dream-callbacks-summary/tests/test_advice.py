"""Advice: one line for each setting, where it applies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from dream_callbacks.summary.advice import advice
from dream_callbacks.summary.run_facts import run_facts
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, tiny_config
from dream_trainer.world import SimulatedWorld

TF32 = 'float32: torch.set_float32_matmul_precision("high")'
PINNED = "training and validation data: DataLoader(pin_memory=True)"
REDUCED = "gradients are reduced in bfloat16: reduce_dtype=torch.float32"


def on_gpu(trainer: TinyTrainer) -> TinyTrainer:
    """A trainer that is set up on the CPU, as if it were on a GPU."""
    trainer.setup()
    trainer.world.device = torch.device("cuda", 0)
    return trainer


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def beginnings(lines: list[str]) -> list[str]:
    return [line.split(" copies")[0].split(" computes")[0].split(" sums")[0] for line in lines]


def test_a_default_run_on_a_gpu_is_advised(tmp_path: Path) -> None:
    trainer = on_gpu(TinyTrainer(tiny_config(tmp_path)))

    assert beginnings(advice(trainer)) == [PINNED, TF32]


def test_on_the_cpu_there_is_none(tmp_path: Path) -> None:
    trainer = TinyTrainer(tiny_config(tmp_path))
    trainer.setup()

    assert advice(trainer) == []
    assert "advice" not in run_facts(trainer)


class Pins(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        data = [torch.zeros(4)] * 4
        # torch's own pinning starts with the first batch.
        return DataLoader(data, pin_memory=True), [torch.zeros(1, 4)]  # type: ignore[arg-type]


def test_pinned_loaders_and_other_iterables_need_no_advice(tmp_path: Path) -> None:
    trainer = on_gpu(Pins(tiny_config(tmp_path)))

    assert beginnings(advice(trainer)) == [TF32]


@pytest.mark.parametrize("how", ["old", "new", "bf16", "older-gpu"])
def test_matrix_products_that_are_fast_or_cant_be_need_no_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    device = DeviceParameters(device="cpu", param_dtype=torch.bfloat16 if how == "bf16" else None)
    trainer = on_gpu(Pins(tiny_config(tmp_path, device=device)))
    if how == "old":
        torch.set_float32_matmul_precision("high")
    elif how == "new":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif how == "older-gpu":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))

    assert advice(trainer) == []


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"param_dtype": torch.bfloat16}, [REDUCED]),
        ({"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}, []),
        ({}, []),
    ],
    ids=["bf16", "float32", "default"],
)
def test_gradients_reduced_in_low_precision_are_advised(
    tmp_path: Path, fields: dict[str, Any], expected: list[str]
) -> None:
    device = DeviceParameters.FSDP(**fields)
    with SimulatedWorld(rank=0, world_size=2) as world:
        trainer = TinyTrainer(tiny_config(tmp_path, device=device), world=world)
        trainer.setup()

        assert beginnings(advice(trainer)) == expected
        assert beginnings(run_facts(trainer).get("advice", [])) == expected
