"""Resuming on another number of ranks or layout: same weights, optimizer state and samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from training import Everything, History, different, directory, make, moments, weights

from dream_callbacks.checkpoint import load_weights
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import run_on_ranks
from dream_trainer.testing.trainers import TinyModel
from dream_trainer.trainer import WeightedMean


class Plain(Everything):
    """Without noise: samples and losses don't depend on the number of ranks."""

    noise = 0.0
    dropout = 0.0

    def apply_tensor_parallel(self, mesh: DeviceMesh) -> None:
        replicated = Replicate()
        columns = ColwiseParallel(output_layouts=replicated)
        rows = RowwiseParallel(input_layouts=replicated)
        parallelize_module(self.model, mesh, {"embed": columns, "blocks.*": columns, "head": rows})


def part(root: Path, layout: str, until: int | None) -> dict[str, Any]:
    """Continue a run in a layout, to a step or to its end."""
    history = History()
    training = {"n_epochs": 2, "max_steps": until}
    trainer = make(
        root, history, kind=Plain, layout=layout, every=Every(steps=100), training=training
    )
    trainer.setup()
    loaded = weights(trainer), moments(trainer) if trainer.global_step else {}
    trainer.fit()
    seen = {}
    world = trainer.world
    ranks_per_part = world.world_size // world.dp_size  # that read the same samples
    for batch, (loss, inputs) in history.batches.items():
        mine = {"loss": loss / world.world_size, "in": inputs / ranks_per_part}
        reduced = world.all_reduce(mine, "sum")
        seen[batch] = (reduced["loss"], reduced["in"])
    return {
        "loaded": loaded,
        "final": (weights(trainer), moments(trainer)),
        "seen": seen,
        "epochs": history.epochs,
    }


WAYS = [
    [("fsdp", 2, 3), ("single", 1, None)],
    [("single", 1, 3), ("fsdp", 2, None)],
    [("ddp", 2, 8), ("fsdp", 2, None)],
    [("fsdp", 2, 4), ("ddp", 2, 7), ("single", 1, None)],
    [("fsdp", 4, 3), ("fsdp", 2, 5), ("single", 1, 8), ("hsdp", 4, None)],
    [("fsdp", 2, 3), ("ddp", 2, 7), ("fsdp+tp", 4, 9), ("single", 1, None)],
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{x}{n}" for x, n, _ in way))
def test_a_run_resumes_in_another_layout(
    tmp_path: Path, way: list[tuple[str, int, int | None]]
) -> None:
    (uninterrupted,) = run_on_ranks(part, 1, tmp_path / "uninterrupted", "single", None)
    seen: dict[int, Any] = {}
    before = None
    for layout, num_ranks, until in way:
        results = run_on_ranks(part, num_ranks, tmp_path / "moved", layout, until)
        if before is not None:
            assert not different(results[0]["loaded"][0], before[0]), "weights, bit for bit"
            assert not different(results[0]["loaded"][1], before[1]), "moments, bit for bit"
        before = results[0]["final"]
        seen |= results[0]["seen"]
        module = TinyModel(8, 2)
        load_weights(directory(tmp_path / "moved"), module, "last")
        plain = {f"model.{name}": tensor for name, tensor in module.state_dict().items()}
        assert not different(plain, before[0]), f"weights of {layout} in a plain module"

    assert seen.keys() == uninterrupted["seen"].keys()
    for batch, (loss, inputs) in uninterrupted["seen"].items():
        assert seen[batch][1] == pytest.approx(inputs, abs=1e-5), "the same samples"
        assert seen[batch][0] == pytest.approx(loss, rel=1e-4), "losses, to rounding"
    assert results[0]["epochs"][1] == pytest.approx(uninterrupted["epochs"][1], rel=1e-4)
    for name, tensor in uninterrupted["final"][0].items():
        torch.testing.assert_close(before[0][name], tensor, rtol=1e-3, atol=1e-5)  # type: ignore[index]


def test_weights_and_optimizer_are_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    before: Any = None
    for step, num_ranks in enumerate((1, 2, 3, 4, 3, 1), start=1):
        layout = "single" if num_ranks == 1 else "fsdp"

        results = run_on_ranks(part, num_ranks, tmp_path, layout, step)

        for result in results if before is not None else ():
            assert not different(result["loaded"][0], before[0]), f"weights on {num_ranks}"
            assert not different(result["loaded"][1], before[1]), f"moments on {num_ranks}"
        before = results[0]["final"]


def test_a_warning_names_the_saved_and_the_current_number_of_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_on_ranks(part, 2, tmp_path, "fsdp", 3)

    trainer = make(tmp_path, kind=Plain)
    trainer.setup()

    assert "was saved by 2 data-parallel ranks, and there are 1" in caplog.text
    assert trainer.counters.epoch_batches == 3


class Weighted(Plain):
    """Reports a mean with weights that grow, and counts in a metric of training."""

    reports = "all kinds"

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        _, x = batch
        return {**result, "mean": WeightedMean(x.mean(), torch.tensor(len(x) * (batch_idx + 1)))}


class Epochs(Callback[Any]):
    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.results.append(result)


def weighted_part(root: Path, layout: str, until: int | None) -> list[dict[str, Any]]:
    epochs = Epochs()
    training = {"n_epochs": 1, "max_steps": until}
    make(root, epochs, kind=Weighted, layout=layout, training=training).fit()
    return epochs.results


def test_a_weighted_mean_of_an_epoch_is_the_same_in_another_layout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (whole,) = weighted_part(tmp_path / "whole", "single", None)
    run_on_ranks(weighted_part, 2, tmp_path / "moved", "fsdp", 3)
    caplog.clear()
    (moved,) = weighted_part(tmp_path / "moved", "single", None)

    assert moved["mean"] == pytest.approx(whole["mean"], rel=1e-6)
    assert "the state of the metrics of training sums isn't restored; in this epoch" in caplog.text
