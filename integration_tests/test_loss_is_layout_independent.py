"""One task, one global batch: every layout gives the losses and weights of one process.

And, bit for bit, those of the same layout written in plain PyTorch.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import plain
import pytest
from torch import Tensor
from torch.testing import assert_close
from toy import CALLBACKS, make

from dream_trainer import callbacks
from dream_trainer.testing import run_on_ranks
from tools.matrix import Cell
from tools.packages import BY_SHORT_NAME

# Sums of float32 over parts of a batch, in another order: the last bits differ and grow with Adam.
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = 1e-4
# GPUs add in another order, in matrix products too.
CUDA_TOLERANCE = 1e-3

STEPS = 20
ACCUMULATION = {"gradient_accumulation_steps": 3}
CLIPPING = {"gradient_clip_val": 0.1}
TRAINING: list[Any] = [
    pytest.param({}, id="plain"),
    pytest.param(ACCUMULATION | CLIPPING, id="accumulation+clipping"),
    pytest.param(ACCUMULATION, id="accumulation", marks=pytest.mark.full),
    pytest.param(CLIPPING, id="clipping", marks=pytest.mark.full),
]

Outcome = tuple[list[float], dict[str, Tensor], dict[str, float]]


def trained(
    layout: str,
    device: Literal["cpu", "cuda"],
    root: str,
    training: dict[str, Any],
    callback_names: tuple[str, ...] = (),
) -> Outcome:
    """Losses of the global batches, the final weights, and their results on the validation sets."""
    own = [getattr(callbacks, name)() for name in callback_names]
    trainer, losses = make(
        root, layout, device, own, max_steps=STEPS, val_every_n_steps=STEPS, **training
    )
    trainer.fit()
    weights = plain.weights_of(trainer.model)
    (validation,) = losses.validations
    return losses.losses, {name: weight.cpu() for name, weight in weights.items()}, validation


def device_of(cell: Cell) -> Literal["cpu", "cuda"]:
    return "cuda" if cell.backend == "nccl" else "cpu"


@pytest.mark.parametrize("training", TRAINING)
def test_losses_and_weights_equal_those_of_one_process(
    tmp_path: Path, cell: Cell, training: dict[str, Any]
) -> None:
    device, root = device_of(cell), str(tmp_path)
    ((losses, weights, validation),) = run_on_ranks(trained, 1, "single", device, root, training)
    outcomes = run_on_ranks(trained, cell.ranks, cell.layout, device, root, training)

    tolerances = (LOSS_TOLERANCE, WEIGHT_TOLERANCE)
    loss_tolerance, weight_tolerance = tolerances if device == "cpu" else [CUDA_TOLERANCE] * 2
    assert len(losses) >= STEPS
    assert validation.keys() == {
        f"{name}/{key}" for name in ("all", "five") for key in ("val_loss", "second_token")
    }
    for found_losses, found_weights, found_validation in outcomes:
        assert found_losses == pytest.approx(losses, abs=loss_tolerance)
        assert found_validation == pytest.approx(validation, abs=loss_tolerance)
        for name, expected in weights.items():
            assert_close(
                found_weights[name], expected, atol=weight_tolerance, rtol=weight_tolerance
            )


def test_installed_callbacks_change_no_bit(
    tmp_path: Path, cell: Cell, pytestconfig: pytest.Config
) -> None:
    installed = {distribution.short_name for distribution in cell.distributions}
    if pytestconfig.getoption("--cell"):  # in its own environment
        for name in BY_SHORT_NAME.keys() - installed - {"core"}:
            assert not is_importable(f"dream_callbacks.{name}")
    names = tuple(CALLBACKS[name] for name in sorted(installed - {"core"}))
    device = device_of(cell)

    without = run_on_ranks(trained, cell.ranks, cell.layout, device, str(tmp_path / "1"), {})
    found = run_on_ranks(trained, cell.ranks, cell.layout, device, str(tmp_path / "2"), {}, names)

    assert [losses for losses, *_ in found] == [losses for losses, *_ in without]


def is_importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False


LAYOUTS = [
    ("single", 1),
    ("ddp", 2),
    ("fsdp", 2),
    ("tp", 2),
    ("cp", 2),
    *(
        pytest.param(layout, 4, marks=pytest.mark.full)
        for layout in ("ddp", "fsdp", "hsdp", "tp", "ddp+tp", "fsdp+tp", "cp", "fsdp+cp")
    ),
]


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize(("layout", "num_ranks"), LAYOUTS)
def test_losses_and_weights_equal_plain_pytorch_bit_for_bit(
    tmp_path: Path, layout: str, num_ranks: int, training: dict[str, Any]
) -> None:
    accumulation = training.get("gradient_accumulation_steps", 1)
    clip_norm = training.get("gradient_clip_val")
    expected = run_on_ranks(plain.train, num_ranks, layout, STEPS, accumulation, clip_norm)
    found = run_on_ranks(trained, num_ranks, layout, "cpu", str(tmp_path), training)

    assert len(found[0][0]) >= STEPS
    for (losses, weights, _), (expected_losses, expected_weights) in zip(
        found, expected, strict=True
    ):
        assert losses == expected_losses
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            assert weight.equal(expected_weights[name]), name
