"""What CUDA graphs and compiled steps need of the loop, as far as a CPU shows it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config


class Reports(Callback[TinyTrainer]):
    """Keeps the results of the steps and of the epochs."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.epochs: list[dict[str, Any]] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.steps.append(result)

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.steps.append(result)

    def post_train_epoch(self, result: dict[str, Any]) -> None:
        self.epochs.append(result)

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self.epochs.append(result)


class Replays(TinyTrainer):
    """Each step writes its loss to the same memory, as a CUDA graph's replays do."""

    def setup(self) -> None:
        self.output = torch.zeros(())
        self.losses: list[float] = []
        super().setup()

    def replay(self, loss: Tensor) -> Tensor:
        self.losses.append(loss.item())
        return self.output.copy_(loss.detach())

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.replay(super().training_step(batch, batch_idx)["loss"])}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"val_loss": self.replay(super().validation_step(batch, batch_idx)["val_loss"])}


def test_results_that_the_next_step_overwrites_are_kept_and_averaged(tmp_path: Path) -> None:
    reports = Reports()
    trainer = Replays(tiny_config(tmp_path, [reports]))
    trainer.fit()

    assert [value.item() for step in reports.steps for value in step.values()] == trainer.losses
    assert reports.epochs == [
        {"loss": pytest.approx(sum(trainer.losses[:8]) / 8)},
        {"val_loss": pytest.approx(sum(trainer.losses[8:]) / 2)},
    ]


def test_a_parameter_that_is_reported_has_its_value_of_each_step(tmp_path: Path) -> None:
    class Scaled(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.register_parameter("scale", nn.Parameter(torch.zeros(())))

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            super().training_step(batch, batch_idx)
            with torch.no_grad():
                self.model.scale.add_(1.0)
            return {"scale": self.model.scale}

    reports = Reports()
    Scaled(tiny_config(tmp_path, [reports], val_every_n_steps=0)).fit()

    assert [step["scale"].item() for step in reports.steps] == list(range(1, 9))
    assert reports.epochs == [{"scale": 4.5}]


def num_marks(directory: Path, **training: Any) -> int:
    from torch._inductor.cudagraph_trees import MarkStepBox

    before = MarkStepBox.mark_step_counter
    TinyTrainer(tiny_config(directory, **training)).fit()
    return before - MarkStepBox.mark_step_counter


def marks_and_modules(directory: Path) -> tuple[bool, list[int]]:
    TinyTrainer(tiny_config(directory)).fit()
    is_loaded = "torch._inductor.cudagraph_trees" in sys.modules
    training_only = {"val_every_n_steps": 0}
    return is_loaded, [
        num_marks(directory, **training_only),
        num_marks(directory, gradient_accumulation_steps=3, **training_only),
        num_marks(directory),
    ]


def test_each_optimizer_step_and_each_evaluated_batch_is_marked(tmp_path: Path) -> None:
    # With accumulation not each batch: the gradients so far may be in a graph's memory.
    ((is_loaded, marks),) = run_on_ranks(marks_and_modules, 1, tmp_path)

    assert not is_loaded
    assert marks == [8, 3, 8 + 2]


# Torch's, when it traces self.backward(loss); it shows it to nobody.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_optimizer_and_its_hooks_are_not_compiled_with_training_step(tmp_path: Path) -> None:
    graphs: list[list[str]] = []
    compiling: list[bool] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    class Looks(Callback[TinyTrainer]):
        def pre_optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            compiling.append(torch.compiler.is_compiling())

    class Compiled(TinyTrainer):
        @torch.compile(backend=backend)
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return super().training_step(batch, batch_idx)

    Compiled(tiny_config(tmp_path, [Looks()], n_epochs=2)).fit()

    assert len(graphs) == 1  # the forward, once
    assert any("mse_loss" in name for name in graphs[0])
    assert compiling == [False] * 16
