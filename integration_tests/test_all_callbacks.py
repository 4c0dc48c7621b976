"""Every built-in callback conforms, and has its place in the plan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dream_trainer import callbacks
from dream_trainer.callbacks import (
    AsyncCheckpointCallback,
    BenchmarkCallback,
    Callback,
    CallbackCollection,
    CheckpointCallback,
    CheckpointParameters,
    Every,
    ExportCallback,
    FindGraphBreaksCallback,
    JSONLinesSink,
    LoadPartialCheckpointCallback,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    ModelSummary,
    ModelWatchCallback,
    OptimizeFSDP,
    ProfileCallback,
    ProgressBar,
    TensorBoardSink,
    TrainerSummary,
)
from dream_trainer.testing import TinyTrainer, check_callback, tiny_config
from dream_trainer.trainer import BaseTrainer
from dream_trainer.trainer.mixins import SetupMixin

MAKERS: dict[str, Callable[[Path], Callback[Any]]] = {
    "AsyncCheckpointCallback": lambda source: AsyncCheckpointCallback(
        CheckpointParameters(every=Every(steps=1))
    ),
    "BenchmarkCallback": lambda source: BenchmarkCallback(skip=1, every=Every(steps=1)),
    "CheckpointCallback": lambda source: CheckpointCallback(
        CheckpointParameters(every=Every(steps=1))
    ),
    "ExportCallback": lambda source: ExportCallback("weights.pt", format="torch"),
    "FindGraphBreaksCallback": lambda source: FindGraphBreaksCallback(),
    "LRLoggerCallback": lambda source: LRLoggerCallback(),
    "LoadPartialCheckpointCallback": lambda source: LoadPartialCheckpointCallback(source),
    "LoggerCallback": lambda source: LoggerCallback(1, sinks=[JSONLinesSink(), TensorBoardSink()]),
    "MediaLoggerCallback": lambda source: MediaLoggerCallback(),
    "MetricLoggerCallback": lambda source: MetricLoggerCallback(),
    "ModelSummary": lambda source: ModelSummary(),
    "ModelWatchCallback": lambda source: ModelWatchCallback(log="all", log_freq=1),
    "OptimizeFSDP": lambda source: OptimizeFSDP(),
    "ProfileCallback": lambda source: ProfileCallback(skip_first=0, warmup=1, active=1),
    "ProgressBar": lambda source: ProgressBar(),
    "TrainerSummary": lambda source: TrainerSummary(),
}
"""Each with options that give it something to do in a run of a few steps.

`source` is the directory of a run with checkpoints.
"""


def test_every_callback_is_tested() -> None:
    named = {name for name in dir(callbacks) if name not in callbacks.__all__}
    classes = {name: getattr(callbacks, name, None) for name in named if name[0].isupper()}

    assert {
        name
        for name, value in classes.items()
        if isinstance(value, type) and issubclass(value, Callback)
    } == set(MAKERS)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(tmp_path_factory.mktemp("source"), [CheckpointCallback()], max_steps=3)
    trainer = TinyTrainer(config)
    trainer.fit()
    return trainer.run_dir


@pytest.mark.full  # each package's tests make the same checks, with that package alone
@pytest.mark.parametrize("name", MAKERS)
def test_each_callback_conforms(name: str, source: Path) -> None:
    make = functools.partial(MAKERS[name], source)
    check_callback(make, changes_training=name == "LoadPartialCheckpointCallback")


@pytest.mark.parametrize("name", [*MAKERS, "all"])
def test_a_trainer_with_it_is_evaluated_before_and_after_it_trains(
    name: str, tmp_path: Path, source: Path
) -> None:
    names = MAKERS.keys() - {"AsyncCheckpointCallback"} if name == "all" else [name]

    def trained(*, evaluates: bool) -> Any:
        root = tmp_path / str(evaluates)
        made = [MAKERS[each](source) for each in sorted(names)]
        trainer = TinyTrainer(tiny_config(root, made, n_epochs=1))
        for n_epochs in (1, 2):
            if evaluates:
                trainer.validate()
                trainer.test(trainer.val_dataloader)
                trainer.predict(trainer.val_dataloader)
            trainer.training_parameters.n_epochs = n_epochs
            trainer.fit()
        return [value.tolist() for value in trainer.model.state_dict().values()]

    assert trained(evaluates=True) == trained(evaluates=False)


class Small(BaseTrainer, SetupMixin):
    """A user's trainer of a few mixins, without logging and metrics."""

    configure_models = TinyTrainer.configure_models
    configure_optimizers = TinyTrainer.configure_optimizers
    configure_dataloaders = TinyTrainer.configure_dataloaders
    _loader = TinyTrainer._loader  # noqa: SLF001  # all of TinyTrainer but its mixins
    training_step = TinyTrainer.training_step
    validation_step = TinyTrainer.validation_step


LOGS = {
    "LRLoggerCallback",
    "LoggerCallback",
    "MediaLoggerCallback",
    "MetricLoggerCallback",
    "ModelWatchCallback",
}


@pytest.mark.parametrize("name", sorted(LOGS))
def test_callbacks_that_log_require_a_logger_mixin(name: str, tmp_path: Path, source: Path) -> None:
    with pytest.raises(TypeError, match=f"{name} needs a trainer with .*LoggerMixin"):
        Small(tiny_config(tmp_path, [MAKERS[name](source)]))


def test_other_callbacks_accept_a_trainer_of_few_mixins(tmp_path: Path, source: Path) -> None:
    others = (
        MAKERS.keys() - LOGS - {"AsyncCheckpointCallback"}
    )  # a second one in the same directory is refused
    trainer = Small(tiny_config(tmp_path, [MAKERS[name](source) for name in sorted(others)]))
    trainer.fit()

    assert trainer.global_step == 8


class EMACallback(Callback[Any]):
    """A third-party callback, listed last: its average must not be saved as the model's weights."""

    def pre_validation_epoch(self) -> None: ...

    def post_optimizer_step(self, model: Any, optimizer: Any) -> None: ...

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None: ...

    def post_validation_epoch(self, result: dict[str, Any]) -> None: ...


PLAN = """\
pre_launch             LoggerCallback
post_setup             LoadPartialCheckpointCallback, ModelSummary*, ExportCallback,
                       CheckpointCallback, TrainerSummary*
pre_fit                ProgressBar*, LoggerCallback, LRLoggerCallback*, MediaLoggerCallback*,
                       ModelWatchCallback, ProfileCallback, FindGraphBreaksCallback,
                       BenchmarkCallback*, CheckpointCallback
pre_train_epoch        ProgressBar*, LoggerCallback, ProfileCallback, BenchmarkCallback*
pre_train_step         OptimizeFSDP, BenchmarkCallback*, CheckpointCallback
pre_optimizer_step     LRLoggerCallback*, ModelWatchCallback
post_optimizer_step    ModelWatchCallback, EMACallback
post_train_step        OptimizeFSDP, ProgressBar*, LoggerCallback, LRLoggerCallback*,
                       ModelWatchCallback, ProfileCallback, FindGraphBreaksCallback,
                       BenchmarkCallback*, EMACallback, CheckpointCallback
post_train_epoch       ProgressBar*, LoggerCallback, CheckpointCallback
pre_validation_epoch   ProgressBar*, LoggerCallback, MetricLoggerCallback*, ProfileCallback,
                       EMACallback, CheckpointCallback
post_validation_step   ProgressBar*, LoggerCallback, MetricLoggerCallback*, MediaLoggerCallback*
post_validation_epoch  ProgressBar*, LoggerCallback, MetricLoggerCallback*, MediaLoggerCallback*,
                       ProfileCallback, FindGraphBreaksCallback, BenchmarkCallback*, EMACallback,
                       CheckpointCallback
post_epoch             ProgressBar*, CheckpointCallback
on_exception           CheckpointCallback
post_fit               OptimizeFSDP, ProgressBar*, LoggerCallback, ProfileCallback,
                       FindGraphBreaksCallback, BenchmarkCallback*, ExportCallback,
                       CheckpointCallback
                       * on global rank 0 alone
"""


def test_the_plan_of_a_production_stack(tmp_path: Path) -> None:
    stack = CallbackCollection(
        [
            CheckpointCallback(),
            TrainerSummary(),
            ModelSummary(),
            ProgressBar(),
            LoggerCallback(),
            LRLoggerCallback(),
            MetricLoggerCallback(),
            MediaLoggerCallback(),
            ModelWatchCallback(),
            ProfileCallback(),
            FindGraphBreaksCallback(),
            BenchmarkCallback(),
            OptimizeFSDP(),
            EMACallback(),
            ExportCallback("weights.pt", format="torch"),
            LoadPartialCheckpointCallback("pretrained"),
        ]
    )
    trainer = TinyTrainer(tiny_config(tmp_path, stack))

    assert str(trainer.callbacks.plan()) == PLAN.rstrip()
