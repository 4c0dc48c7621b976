"""All packages together: the plan of one stack, its files, and its device syncs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import LAYOUTS, Toy

from dream_callbacks.logging import read_jsonl, series
from dream_trainer import DreamTrainerConfig
from dream_trainer.callbacks import (
    BenchmarkCallback,
    Callback,
    CallbackCollection,
    CheckpointCallback,
    CheckpointParameters,
    Every,
    FindGraphBreaksCallback,
    JSONLinesSink,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    ModelWatchCallback,
    OptimizeFSDP,
    ProfileCallback,
    ProgressBar,
    TensorBoardSink,
    TrainerSummary,
)
from dream_trainer.configs import DeviceParameters, TrainingParameters
from dream_trainer.testing import run_on_ranks


def stack(*others: Callback[Any], log_every: int = 5) -> CallbackCollection:
    return CallbackCollection(
        [
            TrainerSummary(),
            ProgressBar(metric="loss"),
            LoggerCallback(
                log_every_n_train_batches=log_every, sinks=[JSONLinesSink(), TensorBoardSink()]
            ),
            LRLoggerCallback(),
            ProfileCallback(),
            OptimizeFSDP(),
            CheckpointCallback(CheckpointParameters(every=Every(steps=6))),
            *others,
        ]
    )


def make(root: str, layout: str, callbacks: CallbackCollection, **training: Any) -> Toy:
    return Toy(
        DreamTrainerConfig(
            root_dir=root,
            experiment="together",
            device_parameters=LAYOUTS[layout](device="cpu"),
            training_parameters=TrainingParameters(**training),
            callbacks=callbacks,
        )
    )


def test_the_plan_of_the_complete_stack() -> None:
    hooks = stack().plan().hooks

    # It saves the state that others leave at the end of a step, and restores before `fit`.
    for hook in ("post_train_step", "post_validation_epoch", "post_epoch", "pre_fit", "post_fit"):
        assert hooks[hook][-1] == "CheckpointCallback", hook
    assert hooks["post_setup"][-2:] == ("CheckpointCallback", "TrainerSummary")
    assert hooks["post_train_step"] == (
        "OptimizeFSDP",
        "ProgressBar",
        "LoggerCallback",
        "LRLoggerCallback",
        "ProfileCallback",
        "CheckpointCallback",
    )
    assert stack().plan().rank_zero == {"TrainerSummary", "ProgressBar", "LRLoggerCallback"}


def trained_twice(root: str, layout: str) -> tuple[list[int], list[float]]:
    steps, losses = [], []

    class Watches(Callback[Any]):
        def pre_fit(self) -> None:
            steps.append(self.trainer.global_step)

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            losses.append(self.trainer.world.all_reduce(result["loss"]).item())

    make(root, layout, stack(Watches()), n_epochs=3, max_steps=10).fit()
    make(root, layout, stack(Watches()), n_epochs=3, max_steps=20).fit()
    return steps, losses


@pytest.mark.parametrize(
    ("layout", "num_ranks"), [("single", 1), ("fsdp", 2)], ids=["w1-single", "w2-fsdp"]
)
def test_a_run_with_all_callbacks_resumes_and_writes_its_files(
    tmp_path: Path, layout: str, num_ranks: int
) -> None:
    outcomes = run_on_ranks(trained_twice, num_ranks, str(tmp_path), layout)
    straight = run_on_ranks(_losses_alone, num_ranks, str(tmp_path / "alone"), layout)

    for (steps, losses), expected in zip(outcomes, straight, strict=True):
        assert steps == [0, 10]
        assert losses == expected
    run_dir = tmp_path / "dream-trainer" / "default" / "together"
    steps_logged, values = series(read_jsonl(run_dir), "train/loss")
    assert steps_logged == [5, 10, 15, 20]
    assert values == pytest.approx([straight[0][step - 1] for step in steps_logged], rel=1e-6)
    assert list((run_dir / "checkpoints").iterdir())
    assert list((run_dir / "profile").rglob("*.pt.trace.json.gz"))
    assert list(run_dir.rglob("events.out.tfevents.*"))


def _losses_alone(root: str, layout: str) -> list[float]:
    losses: list[float] = []

    class Watches(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            losses.append(self.trainer.world.all_reduce(result["loss"]).item())

    make(root, layout, CallbackCollection([Watches()]), n_epochs=3, max_steps=20).fit()
    return losses


class HostReads(TorchDispatchMode):
    """Records the step of each read of a tensor's value on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.steps: list[int] = []
        self._copies = HostCopies(self)

    def __enter__(self) -> Any:
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero"):
            self.steps.append(self.step)
        return func(*args, **(kwargs or {}))


class HostCopies(TorchFunctionMode):
    """Records calls that copy from a device; on the CPU they are no operations."""

    def __init__(self, reads: HostReads) -> None:
        super().__init__()
        self._reads = reads

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        devices = [each for each in (*args, *kwargs.values()) if isinstance(each, str)]
        name = getattr(func, "__name__", "")
        if name in ("cpu", "tolist", "numpy", "__array__") or (name == "to" and "cpu" in devices):
            self._reads.steps.append(self._reads.step)
        return func(*args, **kwargs)


class LongEpoch(Toy):
    """An epoch of 304 batches, with two values each, so that many are averaged before it ends."""

    def configure_optimizers(self) -> None:
        # AdamW keeps its step counts in CPU memory and reads them there, on any device.
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        return list(train) * 38, val

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        return {**result, "perplexity": result["loss"].detach().exp()}


class ReadsEachStep(Callback[Any]):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        result["loss"].item()


class CopiesEachStep(Callback[Any]):
    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        result["loss"].to("cpu")


LOG_EVERY = VALIDATE_EVERY = 50

MAY_READ = {0, 1} | set(range(0, 301, LOG_EVERY))
"""The first step, and those that log, validate or save."""


def watching() -> tuple[Callback[Any], ...]:
    return (
        ModelWatchCallback(log="all", log_freq=LOG_EVERY),
        BenchmarkCallback(every=Every(steps=LOG_EVERY)),
        MetricLoggerCallback(),
        MediaLoggerCallback(),
        FindGraphBreaksCallback(),
    )


def train(root: Path, device: str, *others: Callback[Any], num_steps: int) -> None:
    callbacks = stack(*others, log_every=LOG_EVERY)
    del callbacks["ProgressBar"]  # it reads CPU tensors when it draws, at times set by the clock
    callbacks["CheckpointCallback"] = CheckpointCallback(
        CheckpointParameters(every=Every(steps=VALIDATE_EVERY))
    )
    config = DreamTrainerConfig(
        root_dir=root,
        device_parameters=DeviceParameters.SINGLE_DEVICE(device=device),
        training_parameters=TrainingParameters(
            max_steps=num_steps, val_every_n_steps=VALIDATE_EVERY, gradient_clip_val=1.0
        ),
        callbacks=callbacks,
    )
    LongEpoch(config).fit()


def steps_that_read(root: Path, *others: Callback[Any], num_steps: int) -> set[int]:
    """The steps that read on the host and have no reason to."""
    reads = HostReads()

    class Notes(Callback[Any]):
        before = {Callback}

        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            reads.step = self.trainer.global_step + 1
            if reads.step == 1:
                reads.__enter__()

        def post_fit(self) -> None:
            reads.__exit__(None, None, None)

    train(root, "cpu", Notes(), *others, num_steps=num_steps)
    return set(reads.steps) - MAY_READ


def test_steps_that_do_not_log_have_no_device_sync(tmp_path: Path) -> None:
    assert steps_that_read(tmp_path / "stack", *watching(), num_steps=150) == set()
    assert len(steps_that_read(tmp_path / "reads", ReadsEachStep(), num_steps=50)) > 20
    assert len(steps_that_read(tmp_path / "copies", CopiesEachStep(), num_steps=50)) > 20


class RefusesWaiting(Callback[Any]):
    """Makes CUDA raise on a device sync in steps that need none."""

    before = {Callback}

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        may_wait = self.trainer.global_step + 1 in MAY_READ
        torch.cuda.set_sync_debug_mode("default" if may_wait else "error")

    def pre_validation_epoch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def pre_epoch(self) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def post_fit(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_that_do_not_log_never_sync_with_the_gpu(tmp_path: Path) -> None:
    train(tmp_path / "stack", "cuda", RefusesWaiting(), *watching(), num_steps=300)

    with pytest.raises(RuntimeError, match="synchronizing"):
        train(tmp_path / "control", "cuda", RefusesWaiting(), ReadsEachStep(), num_steps=50)
