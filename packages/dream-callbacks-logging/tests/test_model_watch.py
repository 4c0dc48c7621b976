from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dream_callbacks.logging import LoggerCallback, ModelWatchCallback, read_jsonl, series
from dream_trainer.callbacks import Callback
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Recorder(Callback[Any]):
    """Reference norms of the whole tensors, computed by torch."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, float]] = []
        self.parameters: list[dict[str, float]] = []

    def pre_optimizer_step(self, model: Any, optimizer: Any) -> None:
        self.gradients.append(
            {name: whole_norm(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        )

    def post_optimizer_step(self, model: Any, optimizer: Any) -> None:
        self.parameters.append({name: whole_norm(p) for name, p in model.named_parameters()})


def whole_norm(tensor: torch.Tensor) -> float:
    tensor = tensor.detach()
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return float(torch.linalg.vector_norm(whole.double()))


def run(directory, device=None, **training: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    callbacks = [LoggerCallback(), ModelWatchCallback("all", 4), recorder]
    trainer = TinyTrainer(tiny_config(directory, callbacks, device=device, **training))
    trainer.fit()
    return trainer.run_dir, recorder


def check(run_dir: Any, recorder: Recorder) -> None:
    rows = [row for row in read_jsonl(run_dir) if "gradient_norm" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for kind, all_norms in (("gradient", recorder.gradients), ("parameter", recorder.parameters)):
        for row, norms in zip(rows, (all_norms[3], all_norms[7]), strict=True):
            found = {
                name.removeprefix(f"{kind}_norm/model."): value
                for name, value in row.items()
                if name.startswith(f"{kind}_norm/")
            }
            assert found == pytest.approx(norms, rel=1e-5)
            assert row[f"{kind}_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)


def histograms(run_dir: Any, name: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(run_dir, "histogram") if line["name"] == name]


def test_norms_match_the_step_and_histograms_count_every_value(tmp_path):
    run_dir, recorder = run(tmp_path)

    check(run_dir, recorder)
    for name in ("gradients/model.blocks.0.weight", "parameters/model.blocks.0.weight"):
        lines = histograms(run_dir, name)
        assert [line["step"] for line in lines] == [4, 8]
        assert all(sum(line["counts"]) == 64 for line in lines)
        assert all(line["low"] < line["high"] for line in lines)


def watched_on_ranks(directory, device):
    run_dir, recorder = run(directory, device)
    return run_dir, recorder


@pytest.mark.parametrize(
    ("device", "num_ranks"),
    [
        (DeviceParameters.DDP(device="cpu"), 2),
        (DeviceParameters.FSDP(device="cpu"), 2),
        (DeviceParameters.HSDP(dp_shard=2, device="cpu"), 4),
    ],
    ids=["ddp", "fsdp", "hsdp"],
)
def test_norms_and_histograms_cover_whole_tensors_in_each_layout(tmp_path, device, num_ranks):
    (run_dir, recorder), *_ = run_on_ranks(
        watched_on_ranks, num_ranks, tmp_path / "ranks", device, timeout_s=90
    )
    single_dir, _ = run(tmp_path / "single")

    check(run_dir, recorder)
    for single, sharded in zip(
        read_jsonl(single_dir, "histogram"), read_jsonl(run_dir, "histogram"), strict=True
    ):
        assert single["name"] == sharded["name"]
        assert sharded["low"] == pytest.approx(single["low"], rel=1e-3, abs=1e-6)
        assert sum(sharded["counts"]) == sum(single["counts"])


class OddGradients(TinyTrainer):
    """A NaN in one gradient, and a parameter without a gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.backward(loss)
        assert self.model.head.weight.grad is not None
        self.model.head.weight.grad[0, 0] = math.nan
        self.model.embed.bias.grad = None
        self.step(self.optimizer)
        return {"loss": loss}


def test_nan_and_missing_gradients_do_not_end_the_run(tmp_path):
    callbacks = [LoggerCallback(), ModelWatchCallback(log_freq=1)]
    trainer = OddGradients(tiny_config(tmp_path, callbacks, max_steps=1))
    with pytest.raises(FloatingPointError, match="no longer finite"):  # after the step
        trainer.fit()

    (row,) = [row for row in read_jsonl(trainer.run_dir) if "gradient_norm" in row]
    assert math.isnan(row["gradient_norm/model.head.weight"])
    assert "gradient_norm/model.embed.bias" not in row
    (line,) = histograms(trainer.run_dir, "gradients/model.head.weight")
    assert sum(line["counts"]) == 7


class TwoOptimizers(TinyTrainer):
    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.embed.parameters(), lr=0.1)
        rest = [*self.model.blocks.parameters(), *self.model.head.parameters()]
        self.other = torch.optim.SGD(rest, lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.backward(loss)
        self.step(self.optimizer)
        self.step(self.other)
        return {"loss": loss}


def test_the_total_is_over_all_optimizers(tmp_path):
    callbacks = [LoggerCallback(), ModelWatchCallback(log_freq=1, histograms=False)]
    trainer = TwoOptimizers(tiny_config(tmp_path, callbacks, max_steps=1))
    trainer.fit()

    (row,) = [row for row in read_jsonl(trainer.run_dir) if "gradient_norm" in row]
    norms = [value for name, value in row.items() if name.startswith("gradient_norm/")]
    assert len(norms) == 8
    assert row["gradient_norm"] == pytest.approx(math.hypot(*norms))
    assert not read_jsonl(trainer.run_dir, "histogram")


@pytest.mark.parametrize(
    ("log", "expected"), [("gradients", {"gradient_norm"}), ("parameters", {"parameter_norm"})]
)
def test_only_the_selected_norms_are_logged(tmp_path, log, expected):
    callbacks = [LoggerCallback(), ModelWatchCallback(log, 2)]
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks, gradient_accumulation_steps=2))
    trainer.fit()

    rows = read_jsonl(trainer.run_dir)
    assert {name for row in rows for name in row if name.endswith("_norm")} == expected
    assert series(rows, expected.pop())[0] == [2, 4]


def test_a_large_tensor_is_subsampled_for_the_histogram_but_not_for_the_norm(tmp_path):
    config = tiny_config(tmp_path, [LoggerCallback(), ModelWatchCallback("parameters", 1)])
    config.width = 1500
    config.num_blocks = 1
    config.training_parameters.max_steps = 1
    trainer = TinyTrainer(config)
    trainer.fit()

    (row,) = [row for row in read_jsonl(trainer.run_dir) if "parameter_norm" in row]
    weight = trainer.model.blocks[0].weight
    assert row["parameter_norm/model.blocks.0.weight"] == pytest.approx(whole_norm(weight))
    (line,) = histograms(trainer.run_dir, "parameters/model.blocks.0.weight")
    assert sum(line["counts"]) == pytest.approx(weight.numel(), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"log": "weights"}, "log='weights'"), ({"log_freq": 0}, "steps=0")],
    ids=str,
)
def test_invalid_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelWatchCallback(**arguments)


class Updates(TinyTrainer):
    """Makes three steps with each batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for _ in range(3):
            result = super().training_step(batch, batch_idx)
        return result


def test_the_first_of_several_updates_is_logged_when_a_multiple_is_passed(tmp_path):
    recorder = Recorder()
    callbacks = [LoggerCallback(), ModelWatchCallback("gradients", 4), recorder]
    trainer = Updates(tiny_config(tmp_path, callbacks))
    trainer.fit()

    rows = [row for row in read_jsonl(trainer.run_dir) if "gradient_norm" in row]
    # First updates of batches are steps 1, 4, 7, …; those that pass a multiple: 4, 10, 13, 16, 22.
    assert [row["step"] for row in rows] == [6, 12, 15, 18, 24]
    for row in rows:
        first = recorder.gradients[row["step"] - 3]
        assert row["gradient_norm"] == pytest.approx(math.hypot(*first.values()), rel=1e-5)
