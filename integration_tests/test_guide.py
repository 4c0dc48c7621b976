"""Every Python block of the callbacks guide, run as written.

A block is executed as a reader would paste it: with the imports that the guide assumes and a
trainer of the reader's. The classes that it defines are attached to that trainer, which trains; the
test checks what it prints and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dream_trainer.callbacks import Callback, CallbackCollection, RankZeroCallback
from dream_trainer.testing import TinyTrainer, run_on_ranks
from dream_trainer.testing.trainers import TinyConfig
from dream_trainer.trainer import BaseTrainer, DreamTrainer, DreamTrainerConfig

GUIDE = Path(__file__).parents[2] / "shared" / "spec" / "callbacks-guide.md"
if not GUIDE.exists():
    pytest.skip(f"the guide isn't here: {GUIDE}", allow_module_level=True)


@dataclasses.dataclass(frozen=True)
class Block:
    """Python code of the guide, and the line where it begins."""

    code: str
    line: int

    def run(self, namespace: dict[str, Any]) -> None:
        # At its line number, so that a traceback shows the line of the guide.
        moved = "\n" * (self.line - 1) + self.code
        exec(compile(moved, str(GUIDE), "exec"), namespace)


def blocks() -> list[Block]:
    text = GUIDE.read_text(encoding="utf-8")
    return [
        Block(match[1], text.count("\n", 0, match.start(1)) + 1)
        for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    ]


# Names that the guide assumes


class MyTrainer(TinyTrainer):
    """The reader's trainer; takes a DreamTrainerConfig, as in the guide."""

    def __init__(self, config: DreamTrainerConfig) -> None:
        given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        super().__init__(TinyConfig(**given))


class Connection:
    """The reader's database; checks that an opened one is closed."""

    opened: list[Connection] = []  # shared by all

    def __init__(self) -> None:
        self.is_open = True
        self.opened.append(self)

    def close(self) -> None:
        self.is_open = False


class Guide:
    """A reader's session, in which blocks run one after the other."""

    def __init__(self) -> None:
        self.namespace: dict[str, Any] = {
            "__name__": "guide",
            "Any": Any,
            "BaseTrainer": BaseTrainer,
            "Callback": Callback,
            "DreamTrainer": DreamTrainer,
            "MyTrainer": MyTrainer,
            "Optimizer": Optimizer,
            "RankZeroCallback": RankZeroCallback,
            "contextlib": contextlib,
            "create_database_connection": Connection,
            "nn": nn,
            "time": time,
            "torch": torch,
        }

    def run(self, marker: str) -> None:
        """Run the only block that contains a text."""
        [block] = [block for block in blocks() if marker in block.code]
        block.run(self.namespace)

    def __getitem__(self, name: str) -> Any:
        return self.namespace[name]


BLOCKS = (
    "class SimpleLoggingCallback",
    "class MetricLoggingCallback",
    "class ModelSummaryCallback",
    "class InitializationCallback",
    "class TrainingCallback",
    "class GradientCallback",
    "class ProfilingCallback",
    "class StatefulCallback",
    'SimpleLoggingCallback("training.log")',
    "CheckpointCallback(checkpoint_config)",
    "trainer.callbacks.append(NewCallback())",
    "class MyCallback",
    "class DistributedAwareCallback",
    "class BadCallback",
    "class ResourceCallback",
)
"""A text that each block alone has. The tests below run them in this order."""


@pytest.fixture
def guide() -> Guide:
    return Guide()


def trained(*callbacks: Callback[Any], trainer_class: type[MyTrainer] = MyTrainer) -> MyTrainer:
    """A trainer that has trained for one epoch of 8 steps, and validated on 2 batches."""
    trainer = trainer_class(DreamTrainerConfig(callbacks=CallbackCollection(callbacks)))
    trainer.fit()
    return trainer


def test_every_block_is_tested() -> None:
    for block in blocks():
        assert [marker in block.code for marker in BLOCKS].count(True) == 1, block


# Creating custom callbacks


def test_basic_callback(guide: Guide) -> None:
    guide.run("class SimpleLoggingCallback")
    trainer = trained(guide["SimpleLoggingCallback"]("my.log"))
    lines = Path("my.log").read_text().splitlines()

    assert lines[0] == f"Training started for {trainer.experiment}"
    assert [re.sub(r"\d+\.\d{4}$", "x", line) for line in lines[1:-1]] == [
        f"Step {step}: loss=x" for step in range(8)
    ]
    assert lines[-1] == "Training completed"


def test_callback_with_dependencies(guide: Guide) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    logging = pytest.importorskip("dream_callbacks.logging")
    guide.run("class MetricLoggingCallback")

    class WithMetrics(MyTrainer, logging.WandBLoggerMixin):
        def configure_metrics(self) -> None:
            self.error = torchmetrics.MeanSquaredError()

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.error.update(self.model(batch[0]), batch[1])
            return super().validation_step(batch, batch_idx)

    callback = guide["MetricLoggingCallback"]()
    logger = logging.LoggerCallback(sinks=[logging.JSONLinesSink()])
    trainer = trained(logger, callback, trainer_class=WithMetrics)
    steps, values = logging.series(logging.read_jsonl(trainer.run_dir), "val/error")

    assert steps[-1] == 8
    assert values[-1] == trainer.error.compute().item()
    with pytest.raises(TypeError, match=r"MetricLoggingCallback needs .* with WandBLoggerMixin"):
        trained(callback)


def test_rank_zero_callback(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class ModelSummaryCallback")
    trainer = trained(guide["ModelSummaryCallback"]())
    total = sum(parameter.numel() for parameter in trainer.model.parameters())

    assert capsys.readouterr().out.splitlines() == [
        f"Total parameters: {total:,}",
        f"Trainable parameters: {total:,}",
        "Non-trainable parameters: 0",
    ]


# Lifecycle hooks


def test_initialization_phase(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class InitializationCallback")
    trained(guide["InitializationCallback"]())

    assert capsys.readouterr().out.splitlines() == [
        "Setting up environment variables",
        "Preparing configuration",
        "Configuration complete",
        "Beginning setup",
        "Setup complete",
    ]


def test_training_phase(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class TrainingCallback")
    trained(guide["TrainingCallback"]())
    lines = capsys.readouterr().out.splitlines()

    assert lines[:2] == ["Starting epoch 0", "Epoch 0 complete"]
    assert re.fullmatch(r"Epoch took \d+\.\d\ds", lines[2])
    assert re.fullmatch(r"Total training time: \d+\.\d\ds", lines[3])
    assert len(lines) == 4


def test_optimizer_hooks(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class GradientCallback")
    trained(guide["GradientCallback"]())
    lines = capsys.readouterr().out.splitlines()

    assert len(lines) == 16
    assert all(re.fullmatch(r"Gradient norm: \d+\.\d{4}", line) for line in lines[::2])
    assert lines[1::2] == ["Learning rate: 0.01"] * 8


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_context_managers(guide: Guide) -> None:
    guide.run("class ProfilingCallback")
    entered = []
    callback = guide["ProfilingCallback"]()
    train_context = callback.train_context

    @contextlib.contextmanager
    def noting() -> Any:
        with train_context():
            entered.append(torch.autograd.profiler._is_profiler_enabled)  # noqa: SLF001  # torch has no public way to ask
            yield

    callback.train_context = noting
    trainer = trained(callback)

    assert len(entered) == 8
    assert trainer.global_step == 8
    assert not torch.autograd.profiler._is_profiler_enabled  # noqa: SLF001


# State


def test_state_management(guide: Guide) -> None:
    guide.run("class StatefulCallback")
    callback = guide["StatefulCallback"]()
    trainer = trained(callback)
    state = trainer.state_dict()
    other = guide["StatefulCallback"]()
    resumed = MyTrainer(DreamTrainerConfig(callbacks=CallbackCollection([other])))
    resumed.setup()
    resumed.load_state_dict(state)

    assert 0 < callback.best_metric < float("inf")
    assert (other.step_count, other.best_metric) == (8, callback.best_metric)
    assert state["trainer"]["callbacks"]["StatefulCallback"]["step_count"] == 8


# Using callbacks


def test_single_callback(guide: Guide) -> None:
    guide.run("class SimpleLoggingCallback")
    guide.run('SimpleLoggingCallback("training.log")')

    assert guide["trainer"].global_step == 8
    assert Path("training.log").read_text().endswith("Training completed\n")


@pytest.mark.filterwarnings("ignore:CUDA is not available, disabling CUDA profiling")
def test_multiple_callbacks(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("checkpoint", "profile", "summary"):
        pytest.importorskip(f"dream_callbacks.{package}")
    from dream_trainer.callbacks import CheckpointCallback, ProfileCallback, ProgressBar
    from dream_trainer.configs import CheckpointParameters

    class CustomMetricCallback(Callback[DreamTrainer]):
        def post_validation_epoch(self, result: dict[str, Any]) -> None:
            self.val_loss = result["val_loss"]

    guide.namespace.update(
        CallbackCollection=CallbackCollection,
        DreamTrainerConfig=DreamTrainerConfig,
        ProgressBar=ProgressBar,
        CheckpointCallback=CheckpointCallback,
        ProfileCallback=ProfileCallback,
        CustomMetricCallback=CustomMetricCallback,
        checkpoint_config=CheckpointParameters(checkpoint_every_n_train_epochs=1),
        profiler=torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        ),
    )
    guide.run("class ModelSummaryCallback")
    guide.run("CheckpointCallback(checkpoint_config)")
    trainer = MyTrainer(guide["config"])
    trainer.fit()
    printed = capsys.readouterr().out

    assert list(trainer.callbacks.keys()) == [
        "ProgressBar",
        "ModelSummaryCallback",
        "CheckpointCallback",
        "ProfileCallback",
        "CustomMetricCallback",
    ]
    assert 0 < trainer.callbacks["CustomMetricCallback"].val_loss < 10  # type: ignore[attr-defined]
    assert "Total parameters" in printed
    assert list((trainer.run_dir / "checkpoints").iterdir())
    assert list((trainer.run_dir / "profile").rglob("*.pt.trace.json*"))
    again = MyTrainer(DreamTrainerConfig(callbacks=guide["callbacks"]))
    again.setup()
    assert again.global_step == 8


def test_adding_callbacks_dynamically(guide: Guide) -> None:
    called: list[str] = []

    class NewCallback(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            called.append(type(self).__name__)

    class CustomCallback(NewCallback): ...

    guide.namespace.update(
        NewCallback=NewCallback, CustomCallback=CustomCallback, config=DreamTrainerConfig()
    )
    guide.run("trainer.callbacks.append(NewCallback())")
    trainer = guide["trainer"]
    trainer.fit()

    assert list(trainer.callbacks.keys()) == ["NewCallback"]
    assert called == ["NewCallback"] * 8


# Best practices


def test_use_type_hints(guide: Guide) -> None:
    guide.run("class MyCallback")
    callback = guide["MyCallback"]()
    trainer = trained(callback)

    assert callback.requirements() == (DreamTrainer,)
    assert dict(trainer.named_models()) == {"model": trainer.model}


def test_handle_distributed_training(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class DistributedAwareCallback")
    trained(guide["DistributedAwareCallback"]())

    assert re.fullmatch(r"Average loss: \d+\.\d+\n", capsys.readouterr().out)


def printed_on_rank(folder: Path) -> tuple[str, float]:
    os.chdir(folder)
    (guide := Guide()).run("class DistributedAwareCallback")
    losses: list[float] = []
    keeping = guide["Callback"]()
    keeping.post_train_epoch = lambda result: losses.append(result["loss"])
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trained(guide["DistributedAwareCallback"](), keeping)
    return printed.getvalue(), losses[0]


def test_handle_distributed_training_on_two_ranks(tmp_path: Path) -> None:
    zero, one = run_on_ranks(printed_on_rank, 2, tmp_path)

    assert zero[0] == f"Average loss: {zero[1]}\n"
    assert one == ("", zero[1])


def test_avoid_side_effects(guide: Guide, capsys: pytest.CaptureFixture[str]) -> None:
    guide.run("class BadCallback")
    trained(guide["GoodCallback"]())

    assert capsys.readouterr().out == "".join(f"Current step: {n}\n" for n in range(1, 9))
    with pytest.raises(AttributeError, match="only the loop changes global_step") as caught:
        trained(guide["BadCallback"]())
    assert "raised in BadCallback.pre_train_step" in caught.value.__notes__[0]


@pytest.mark.parametrize("fails", [False, True], ids=["training_ends", "training_fails"])
def test_resource_management(guide: Guide, fails: bool) -> None:
    class Fails(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if fails:
                raise ZeroDivisionError

    guide.run("class ResourceCallback")
    callback = guide["ResourceCallback"]()
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        trained(Fails(), callback)

    assert callback.file.closed
    assert not any(connection.is_open for connection in Connection.opened)
    assert Connection.opened.pop() is callback.connection


def test_the_guide_as_one_session(guide: Guide) -> None:
    """All classes of the guide in one trainer, as if a reader pasted all of the page."""
    for marker in BLOCKS:
        if marker.startswith("class") and "Metric" not in marker and "Profiling" not in marker:
            guide.run(marker)
    classes = [
        value
        for name, value in guide.namespace.items()
        if isinstance(value, type)
        and value.__module__ == "guide"
        and name not in ("BadCallback", "SimpleLoggingCallback")
    ]
    trainer = trained(guide["SimpleLoggingCallback"]("all.log"), *(cls() for cls in classes))

    assert len(trainer.callbacks) == 10
    assert trainer.callbacks["StatefulCallback"].step_count == 8  # type: ignore[attr-defined]
    assert trainer.callbacks.plan().hooks["post_fit"] == (
        "SimpleLoggingCallback",
        "TrainingCallback",
        "ResourceCallback",
    )
    Connection.opened.clear()
