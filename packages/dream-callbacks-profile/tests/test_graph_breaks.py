"""FindGraphBreaksCallback on models that are compiled while they train."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dream_callbacks.profile import FindGraphBreaksCallback
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

# Dynamo looks at `.grad` of whatever it meets, and hides this from people only.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    """Breaks the graph if `is_broken`."""

    def __init__(self, *, is_broken: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.is_broken = is_broken

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.is_broken:
            torch._dynamo.graph_break()  # noqa: SLF001  # the public way to ask for one
        return torch.tanh(x)


class OuterBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = Block(is_broken=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x) + 1


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


class CompilingTrainer(TinyTrainer):
    """Compiles each block by itself, with a backend that needs no compiler."""

    blocks: list[nn.Module]

    def configure_models(self) -> None:
        self.model = Model(self.blocks)  # type: ignore[assignment]  # another model

    def setup(self) -> None:
        super().setup()
        self.compile()

    def compile(self) -> None:
        for block in self.model.blocks:
            block.compile(backend="eager")


def fit(
    tmp_path: Path,
    blocks: list[nn.Module],
    *callbacks: Callback,
    trainer_class: type[CompilingTrainer] = CompilingTrainer,
    **training: Any,
) -> CompilingTrainer:
    trainer = trainer_class(tiny_config(tmp_path, callbacks, **training))
    trainer.blocks = blocks
    trainer.fit()
    return trainer


def paragraphs(callback: FindGraphBreaksCallback) -> list[str]:
    return [p for p in callback.path.read_text().split("\n\n") if p and not p.startswith("#")]


def test_each_instance_with_a_break_is_named(tmp_path):
    callback = FindGraphBreaksCallback()

    blocks = [Block(is_broken=True), Block(is_broken=False), OuterBlock()]
    fit(tmp_path, blocks, callback, val_steps_per_epoch=0)

    breaks = [p for p in paragraphs(callback) if "graph break in" in p]
    assert [p.partition(" (")[0] for p in breaks] == [
        "model.blocks.0",
        "model.blocks.2",
        "model.blocks.2.inside",
    ]
    assert "test_graph_breaks.py" in breaks[0]
    assert "torch._dynamo.graph_break()" in breaks[0]
    assert "return self.inside(x) + 1" in breaks[1]


def test_instances_that_share_compiled_code_are_listed(tmp_path):
    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=True) for _ in range(4)], callback, val_steps_per_epoch=0)

    (first, *_) = paragraphs(callback)
    assert first.startswith("model.blocks.0 (Block)")
    assert "also used by" in first
    assert "model.blocks.3" in first


def test_a_function_that_is_left_uncompiled_is_reported_with_the_reason(tmp_path):
    class WholeModel(CompilingTrainer):
        def compile(self) -> None:
            self.model.compile(backend="eager")

    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=True)], callback, trainer_class=WholeModel)

    (uncompiled, *_) = paragraphs(callback)
    assert uncompiled.startswith("model (Model)")
    assert "left uncompiled: forward" in uncompiled
    assert "loop" in uncompiled


def test_modules_wrapped_by_compile_keep_their_names(tmp_path):
    class Wrapping(CompilingTrainer):
        def compile(self) -> None:
            for index, block in enumerate(self.model.blocks):
                self.model.blocks[index] = torch.compile(block, backend="eager")

    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=True)], callback, trainer_class=Wrapping)

    assert "model.blocks.0 (Block)" in callback.path.read_text()
    assert "_orig_mod" not in callback.path.read_text()


def test_recompilations_are_reported_with_the_failed_guard(tmp_path):
    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=False)], callback)  # validation runs without gradients

    (again,) = paragraphs(callback)
    assert "recompiled: forward" in again
    assert "grad_mode" in again


def test_the_first_breaks_are_logged_once(tmp_path, caplog):
    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=True)], callback, val_steps_per_epoch=0)

    (warning,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "in step 1: 1 graph break," in warning.message
    assert "model.blocks.0 (Block)" in warning.message
    assert str(callback.path) in warning.message


def test_later_breaks_are_logged_at_the_end(tmp_path, caplog):
    class BreakLater(Callback):
        def post_train_epoch(self, result: dict[str, Any]) -> None:
            self.trainer.named_models()["model"].blocks[1].is_broken = True

    blocks = [Block(is_broken=True), Block(is_broken=False)]
    training = {"n_epochs": 2, "val_steps_per_epoch": 0}

    fit(tmp_path, blocks, FindGraphBreaksCallback(), BreakLater(), **training)

    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "by the end of fit" in warnings[1]
    assert "model.blocks.1" in warnings[1]


def test_losses_and_compilations_are_the_same_with_and_without_it(tmp_path):
    class Losses(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            self.seen.append(float(result["loss"]))

    from torch._dynamo.utils import counters

    def run(*callbacks: Callback) -> tuple[list[float], dict[str, int]]:
        torch.compiler.reset()
        counters.clear()
        torch.manual_seed(0)  # the blocks are made here, not by the trainer
        losses = Losses()
        fit(tmp_path, [Block(is_broken=True), OuterBlock()], losses, *callbacks)
        return losses.seen, dict(counters["frames"])

    assert run(FindGraphBreaksCallback()) == run()


def test_skipped_steps_are_not_reported(tmp_path):
    callback = FindGraphBreaksCallback(skip=1)

    fit(tmp_path, [Block(is_broken=True)], callback, val_steps_per_epoch=0)

    assert not callback.path.exists()


def test_compilations_after_the_skipped_steps_are_reported(tmp_path):
    callback = FindGraphBreaksCallback(skip=1)

    fit(tmp_path, [Block(is_broken=True)], callback)

    validation = paragraphs(callback)
    assert "graph break" in validation[0]
    assert all("grad_mode" in paragraph for paragraph in validation)


def test_fullgraph_raises_an_error_that_shows_the_break(tmp_path):
    with pytest.raises(RuntimeError, match="fullgraph=True") as raised:
        fit(tmp_path, [Block(is_broken=True)], FindGraphBreaksCallback(fullgraph=True))

    assert "model.blocks.0 (Block)" in str(raised.value)
    assert "set fullgraph=False" in str(raised.value)


def test_fullgraph_accepts_whole_graphs(tmp_path):
    trainer = fit(tmp_path, [Block(is_broken=False)], FindGraphBreaksCallback(fullgraph=True))

    assert trainer.global_step == 8


def test_a_run_that_compiles_nothing_is_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    trainer = TinyTrainer(tiny_config(tmp_path, [FindGraphBreaksCallback()]))

    trainer.fit()

    assert "nothing was compiled" in caplog.text
    assert not (trainer.run_dir / "graph_breaks.log").exists()


def test_a_second_fit_reports_only_its_own_compilations(tmp_path):
    callback = FindGraphBreaksCallback()
    trainer = fit(tmp_path, [Block(is_broken=True)], callback)
    before = callback.path.read_text()

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert callback.path.read_text() == before


def test_more_compilations_in_a_step_than_dynamo_keeps_are_all_reported(tmp_path):
    from torch._dynamo.utils import set_compilation_metrics_limit

    # A class of its own each, so that nothing compiled is shared.
    blocks = [
        type(f"Block{n}", (Block,), {"forward": _copied(Block.forward)})(is_broken=True)
        for n in range(6)
    ]
    callback = FindGraphBreaksCallback()
    set_compilation_metrics_limit(3)

    try:
        fit(tmp_path, blocks, callback, max_steps=1, val_steps_per_epoch=0)
    finally:
        set_compilation_metrics_limit(64)

    owners = [p.partition(" (")[0] for p in paragraphs(callback)]
    assert owners == [f"model.blocks.{n}" for n in range(6)]


def _copied(function: Any) -> Any:
    """The same function with code of its own."""
    return type(function)(function.__code__.replace(), function.__globals__)


def test_nothing_is_left_registered_after_fit(tmp_path):
    from torch._dynamo import callback_handler

    before = len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)
    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=True)], callback)
    copy.deepcopy(callback)

    assert (len(callback_handler.start_callbacks), len(callback_handler.end_callbacks)) == before


def test_a_reset_of_dynamo_during_the_run_does_not_end_it(tmp_path):
    class Reset(Callback):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 3:
                torch.compiler.reset()

    callback = FindGraphBreaksCallback()

    trainer = fit(tmp_path, [Block(is_broken=True)], callback, Reset(), val_steps_per_epoch=0)

    assert trainer.global_step == 8


def _breaks_on_rank(root_dir: str) -> tuple[bool, list[str]]:
    callback = FindGraphBreaksCallback()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dream_callbacks.profile.graph_breaks").addHandler(handler)
    trainer = fit(Path(root_dir), [Block(is_broken=True)], callback, val_steps_per_epoch=0)
    return trainer.world.is_global_zero, records


def test_only_rank_zero_writes_and_logs(tmp_path):
    (_, first), (_, second) = run_on_ranks(_breaks_on_rank, 2, str(tmp_path))

    assert len(first) == 1
    assert second == []
    (log_file,) = tmp_path.rglob("graph_breaks.log")
    assert log_file.read_text().count("graph break in forward") == 1


def test_a_compiled_loss_outside_any_model_is_reported(tmp_path):
    class CompiledLoss(CompilingTrainer):
        def compile(self) -> None:
            self.loss_function = torch.compile(_broken_loss, backend="eager")

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            x, y = batch
            loss = self.loss_function(self.model(x), y)
            self.backward(loss)
            self.step(self.optimizer)
            return {"loss": loss}

    callback = FindGraphBreaksCallback()

    fit(tmp_path, [Block(is_broken=False)], callback, trainer_class=CompiledLoss)

    (found,) = paragraphs(callback)
    assert found.startswith("outside any module")
    assert "_broken_loss" in found


def _broken_loss(x: Tensor, y: Tensor) -> Tensor:
    loss = F.mse_loss(x, y)
    torch._dynamo.graph_break()  # noqa: SLF001  # the public way to ask for one
    return loss * 2


@pytest.mark.parametrize("skip", [-1])
def test_a_negative_skip_is_rejected(skip):
    with pytest.raises(ValueError, match="skip=-1"):
        FindGraphBreaksCallback(skip=skip)
