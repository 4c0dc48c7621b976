"""CheckpointCallback: when it saves, what it keeps, what it resumes from."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import pickle
import shutil
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import damage
from tiny_runs import Average, saved, scored, steps, tiny
from torch import nn
from training import (
    CrashAt,
    History,
    PlannedError,
    checkpoints,
    different,
    directory,
    make,
    moments,
    weights,
)

from dream_callbacks.checkpoint import CheckpointCallback, CheckpointError, CheckpointParameters
from dream_callbacks.checkpoint.__main__ import main
from dream_callbacks.checkpoint.catalog import Checkpoint, read_catalog
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.restore import SavedState
from dream_callbacks.checkpoint.testing import prove
from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import TinyTrainer, run_on_ranks
from dream_trainer.trainer import WeightedMean

STEPS_PER_EPOCH = 8


# When it saves


@pytest.mark.parametrize(
    ("cadence", "expected"),
    [
        ({"every": Every(steps=3)}, [3, 6, 9, 12, 15, 16]),
        ({"every": Every(steps=100)}, [16]),
        ({"every": Every(epochs=1)}, [8, 16]),
        ({"every": Every(epochs=2)}, [16]),
        ({"every": Every(steps=5, epochs=1)}, [5, 8, 10, 15, 16]),
        ({"every": Every(seconds=1e-9)}, list(range(1, 17))),
        ({"every": Every(seconds=1e9)}, [16]),
        ({"checkpoint_every_n_train_epochs": 1}, [8, 16]),
        ({"checkpoint_every_n_val_epochs": 1}, [8, 16]),
        ({"checkpoint_every_n_val_epochs": 2}, [16]),
        ({}, [8, 16]),
    ],
    ids=str,
)
def test_saves_happen_at_the_requested_cadence(
    tmp_path: Path, cadence: dict[str, Any], expected: list[int]
) -> None:
    tiny(tmp_path, **cadence).fit()

    assert steps(tmp_path) == expected


def test_validations_between_steps_count(tmp_path: Path) -> None:
    training = {"val_every_n_steps": 3}

    tiny(tmp_path, checkpoint_every_n_val_epochs=2, training=training).fit()

    assert steps(tmp_path) == [6, 12, 16]


def test_saves_happen_only_between_optimizer_steps(tmp_path: Path) -> None:
    training = {"gradient_accumulation_steps": 3}

    tiny(tmp_path, every=Every(seconds=1e-9), training=training, n_epochs=1).fit()

    counters = [state(c, tmp_path)["trainer"]["counters"] for c in saved(tmp_path)]
    assert [(c["global_step"], c["epoch_batches"]) for c in counters] == [(1, 3), (2, 6), (3, 8)]


def state(checkpoint: Checkpoint, root: Path) -> Any:
    import json

    return json.loads((directory(root) / checkpoint.name / "state.json").read_text())


def test_the_manifest_records_the_reason(tmp_path: Path) -> None:
    tiny(tmp_path, every=Every(steps=5, epochs=1)).fit()

    reasons = [checkpoint.manifest.reason for checkpoint in saved(tmp_path)]
    assert reasons == ["every 5 steps", "epoch", "every 5 steps", "every 5 steps", "epoch"]


def test_before_validation_and_after_it_are_different_cadences(tmp_path: Path) -> None:
    tiny(tmp_path / "before", checkpoint_every_n_train_epochs=1, n_epochs=1).fit()
    tiny(tmp_path / "after", checkpoint_every_n_val_epochs=1, n_epochs=1).fit()

    stages = [
        state(saved(root)[0], root)["trainer"]["counters"]["epoch_stage"]
        for root in (tmp_path / "before", tmp_path / "after")
    ]
    assert stages == ["validate", "end"]


def test_nothing_is_saved_before_the_first_step(tmp_path: Path) -> None:
    class StopAtOnce(Callback[Any]):
        def pre_fit(self) -> None:
            self.trainer.stop("at once")

    tiny(tmp_path, StopAtOnce()).fit()

    assert steps(tmp_path) == []


def test_a_stop_saves_the_last_step(tmp_path: Path) -> None:
    class StopAt(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 3:
                self.trainer.stop("enough")

    tiny(tmp_path, StopAt()).fit()

    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(3, "enough")]


def test_restarting_a_finished_run_saves_nothing(tmp_path: Path) -> None:
    tiny(tmp_path).fit()
    before = saved(tmp_path)

    tiny(tmp_path).fit()

    assert saved(tmp_path) == before


def test_enable_false_does_nothing(tmp_path: Path) -> None:
    tiny(tmp_path, enable=False).fit()

    assert list(tmp_path.rglob("*")) == []


def test_root_dir_is_the_parent_of_another_run_directory(tmp_path: Path) -> None:
    trainer = tiny(tmp_path / "runs", root_dir=tmp_path / "elsewhere")

    trainer.fit()

    config = trainer.config
    run = tmp_path / "elsewhere" / config.project / config.group / config.experiment
    assert (run / "checkpoints" / "step-0000000016").is_dir()
    assert not (tmp_path / "runs").exists()


# What it keeps


def test_the_newest_three_are_kept_by_default(tmp_path: Path) -> None:
    tiny(tmp_path, every=Every(steps=2), keep_last=3).fit()

    assert steps(tmp_path) == [12, 14, 16]


def test_the_best_are_saved_and_kept_at_any_cadence(tmp_path: Path) -> None:
    values = {2: 5.0, 4: 1.0, 6: 4.0, 8: 2.0, 10: 9.0, 12: 8.0, 14: 7.0, 16: 3.0}

    tiny(tmp_path, kind=scored(values), keep_top_k=2, keep_last=1, **SCORED).fit()

    assert steps(tmp_path) == [4, 8, 16]
    assert [c.metrics["val_loss"] for c in saved(tmp_path)] == [1.0, 2.0, 3.0]


SCORED: dict[str, Any] = {"every": Every(steps=1000), "training": {"val_every_n_steps": 2}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0], ids=str)
def test_any_metric_value_round_trips(tmp_path: Path, value: float) -> None:
    values = {4: 2.0, 8: value, 12: 3.0, 16: 4.0}
    fields: dict[str, Any] = {"every": Every(steps=4), "training": {"val_every_n_steps": 4}}

    tiny(tmp_path, kind=scored(values), **fields).fit()

    assert steps(tmp_path) == [4, 8, 12, 16]
    assert saved(tmp_path)[1].metrics["val_loss"] == pytest.approx(value, nan_ok=True)
    trainer = tiny(tmp_path, kind=scored(values), resume_mode="best", **fields)
    trainer.setup()
    assert trainer.global_step == (8 if value < 2 else 4)


def test_a_validation_after_the_save_adds_its_metrics(tmp_path: Path) -> None:
    values = {2: 1.0, 4: 5.0}
    fields: dict[str, Any] = {"every": Every(steps=2), "training": SCORED["training"]}

    tiny(tmp_path, kind=scored(values | dict.fromkeys(range(6, 17, 2), 9.0)), **fields).fit()

    assert saved(tmp_path)[0].metrics == {"val_loss": 1.0}
    assert saved(tmp_path)[1].metrics == {"val_loss": 5.0}
    assert saved(tmp_path)[0].manifest.metrics == {}, "the folder never changes"


def test_damaged_metrics_are_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = dict.fromkeys(range(2, 17, 2), 1.0)
    fields: dict[str, Any] = {"every": Every(steps=2), "training": SCORED["training"]}
    tiny(tmp_path, kind=scored(values), **fields).fit()
    damage(directory(tmp_path) / "metrics-0000000004.json")

    trainer = tiny(tmp_path, kind=scored(values), **fields)
    trainer.setup()

    assert trainer.global_step == 16
    assert [c.metrics for c in saved(tmp_path)][:3] == [{"val_loss": 1.0}, {}, {"val_loss": 1.0}]
    assert "metrics-0000000004.json can't be used: its own checksum doesn't match" in caplog.text


def test_an_unknown_monitor_is_an_error_that_lists_the_metrics(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, monitor="accuracy", keep_top_k=1)

    with pytest.raises(CheckpointError, match=r"monitor='accuracy'.*there are loss, val_loss"):
        trainer.fit()

    assert trainer.global_step == STEPS_PER_EPOCH


def test_an_unused_monitor_is_not_checked(tmp_path: Path) -> None:
    tiny(tmp_path, monitor="accuracy").fit()

    assert steps(tmp_path) == [8, 16]


def test_a_training_result_can_be_monitored(tmp_path: Path) -> None:
    tiny(tmp_path, monitor="loss", keep_top_k=1, keep_last=1, n_epochs=4).fit()

    best = min(saved(tmp_path), key=lambda checkpoint: checkpoint.metrics["loss"])
    assert "loss" in best.metrics
    assert len(steps(tmp_path)) <= 2


class TrainsOnly(TinyTrainer):
    """Has no validation loader."""

    def configure_dataloaders(self) -> Any:
        return super().configure_dataloaders()[0]


class CountingTrainer(TrainsOnly):
    """Has a metric of training, which an epoch's result contains."""

    class Count:
        def reset(self) -> None:
            self.count = 0

        def update(self, y: torch.Tensor) -> None:
            self.count += len(y)

        def compute(self) -> int:
            return self.count

    def configure_train_metrics(self) -> None:
        self.count = self.Count()


@pytest.mark.parametrize(
    ("kind", "monitor", "warned_at"),
    [
        (TrainsOnly, "val_loss", 1),
        (TrainsOnly, "loss", None),
        (CountingTrainer, "val_loss", 8),
        (CountingTrainer, "count", None),
        (TinyTrainer, "val_loss", None),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_monitor_that_can_never_come_is_a_warning_at_the_first_step(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: type[TinyTrainer],
    monitor: str,
    warned_at: int | None,
) -> None:
    class SeesWarning(Callback[Any]):
        step: int | None = None

        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            if "there is no validation" in caplog.text and self.step is None:
                self.step = self.trainer.global_step

    sees = SeesWarning()
    tiny(tmp_path, sees, kind=kind, monitor=monitor, keep_top_k=1).fit()

    assert sees.step == warned_at
    assert caplog.text.count("there is no validation, and training_step reports loss") == (
        warned_at is not None
    )


def test_without_val_every_n_steps_a_monitor_of_validation_never_comes_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny(tmp_path, keep_top_k=1, training={"n_epochs": 1, "val_every_n_steps": 0}).fit()

    assert "monitor='val_loss': there is no validation" in caplog.text


def test_numbers_of_any_kind_are_saved_as_metrics(tmp_path: Path) -> None:
    class Numbers(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            numpy = pytest.importorskip("numpy")
            weighted = WeightedMean(torch.tensor(2.0), torch.tensor(batch_idx))
            return {
                "val_loss": numpy.float32(0.5),
                "weighted": weighted,
                "fraction": Fraction(1, 4),
            }

        def compute_metrics(self) -> dict[str, Any]:
            return {"array": pytest.importorskip("numpy").ones(1), "text": "none"}

    tiny(tmp_path, kind=Numbers, keep_top_k=1, training={"n_epochs": 1}).fit()

    (checkpoint,) = saved(tmp_path)
    numbers = {"val_loss": 0.5, "weighted": 2.0, "fraction": 0.25, "array": 1.0}
    assert {name: checkpoint.metrics.get(name) for name in numbers} == numbers
    assert "text" not in checkpoint.metrics


def test_a_checkpoint_deleted_by_the_user_does_not_affect_retention(tmp_path: Path) -> None:
    class DeletesOne(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 4:
                shutil.rmtree(directory(tmp_path) / "step-0000000003")

    tiny(tmp_path, DeletesOne(), every=Every(steps=1), keep_last=2, n_epochs=1).fit()

    assert steps(tmp_path) == [7, 8]


def test_a_checkpoint_is_kept_while_it_is_read(tmp_path: Path) -> None:
    tiny(tmp_path, n_epochs=1, keep_last=1).fit()
    filesystem = LocalFilesystem(directory(tmp_path))

    with filesystem.reading("step-0000000008"):
        tiny(tmp_path, n_epochs=2, keep_last=1).fit()
        assert steps(tmp_path) == [8, 16]
    tiny(tmp_path, n_epochs=3, keep_last=1).fit()

    assert steps(tmp_path) == [24]


class Disagreeing(TinyTrainer):
    """Validation results by which step 4 is best on rank 0 and step 12 on rank 1."""

    def compute_metrics(self) -> dict[str, Any]:
        best = 4 if self.world.rank == 0 else 12
        return {"score": float(abs(self.global_step - best))}


def fit_disagreeing(root: Path) -> None:
    fields: dict[str, Any] = {"monitor": "score", "keep_top_k": 1, "keep_last": 1}
    training = {"val_every_n_steps": 4, "n_epochs": 2}
    tiny(root, kind=Disagreeing, layout="ddp", training=training, **fields).fit()


def test_metrics_of_rank_0_decide_if_ranks_differ(tmp_path: Path) -> None:
    run_on_ranks(fit_disagreeing, 2, tmp_path)

    assert steps(tmp_path) == [4, 16]
    assert saved(tmp_path)[0].metrics["score"] == 0.0


def test_a_validation_without_the_metric_is_never_best(tmp_path: Path) -> None:
    class Sometimes(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            has_score = self.global_step != 8
            score = {"score": torch.tensor(1.0)} if has_score else {}
            return {"other": torch.tensor(0.0), **score}

    fields: dict[str, Any] = {"monitor": "score", "keep_top_k": 4, "keep_last": 1}
    tiny(tmp_path, kind=Sometimes, training={"val_every_n_steps": 4}, **fields).fit()

    assert steps(tmp_path) == [4, 12, 16]


def test_a_sanity_validation_is_not_a_metric(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, keep_top_k=1, training={"num_sanity_val_steps": 1})

    trainer.fit()

    assert steps(tmp_path) == [8, 16]


def test_nan_weights_are_marked_and_skipped_on_resume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Spoil(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 12:
                with torch.no_grad():
                    self.trainer.model.head.weight.fill_(math.nan)

    fields: dict[str, Any] = {"every": Every(steps=4), "keep_last": 1}
    with pytest.raises(FloatingPointError, match="no longer finite"):
        tiny(tmp_path, Spoil(), **fields).fit()

    assert [(c.step, c.manifest.has_nan) for c in saved(tmp_path)] == [(8, False), (16, True)]
    trainer = tiny(tmp_path, **fields)
    trainer.setup()
    assert trainer.global_step == 8
    assert "step-0000000016 has NaN in its weights" in caplog.text


# What it resumes from


def test_last_after_resuming_from_best_is_the_new_branch(tmp_path: Path) -> None:
    values = {4: 1.0, 8: 5.0, 12: 6.0, 16: 7.0}
    fields: dict[str, Any] = {
        "kind": scored(values),
        "every": Every(steps=4),
        "training": {"val_every_n_steps": 4},
    }
    tiny(tmp_path, **fields).fit()

    fields["training"] = {"val_every_n_steps": 4, "max_steps": 6}
    fields["kind"] = scored(values | {6: 0.0})
    tiny(tmp_path, resume_mode="best", **fields).fit()

    assert steps(tmp_path) == [4, 8, 12, 16, 6], "in the order in which they were written"
    trainer = tiny(tmp_path, **fields)
    trainer.setup()
    assert trainer.global_step == 6


def test_a_clock_set_back_does_not_change_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(2_000_000_000, -1000)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(clock)))
        tiny(tmp_path, every=Every(steps=4), keep_last=2).fit()
    for age_s, checkpoint in enumerate(saved(tmp_path)):
        os.utime(directory(tmp_path) / checkpoint.name, (2e9 - age_s, 2e9 - age_s))

    older, newer = saved(tmp_path)
    assert (older.step, newer.step) == (12, 16)
    assert older.manifest.created_unix > newer.manifest.created_unix
    trainer = tiny(tmp_path)
    trainer.setup()
    assert trainer.global_step == 16


def test_a_repeated_step_replaces_its_earlier_checkpoint(tmp_path: Path) -> None:
    tiny(tmp_path, every=Every(steps=4)).fit()
    old = {c.step: c.manifest.run for c in saved(tmp_path)}

    tiny(tmp_path, every=Every(steps=4), resume_mode=4).fit()

    new = {c.step: c.manifest.run for c in saved(tmp_path)}
    assert list(new) == [4, 8, 12, 16]
    assert new[4] == old[4]
    assert all(new[step] != old[step] for step in (8, 12, 16))


def test_resume_none_starts_from_scratch_and_keeps_old_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny(tmp_path, n_epochs=1).fit()
    first = directory(tmp_path) / "step-0000000008"
    content = {path.name: path.read_bytes() for path in first.iterdir()}

    trainer = tiny(tmp_path, n_epochs=1, resume_mode=None)
    trainer.setup()

    assert trainer.global_step == 0
    assert "1 checkpoints that were in" in caplog.text
    moved = directory(tmp_path) / "before-1" / "step-0000000008"
    assert {path.name: path.read_bytes() for path in moved.iterdir()} == content
    trainer.fit()
    tiny(tmp_path, n_epochs=1, resume_mode=None).setup()
    assert (directory(tmp_path) / "before-2" / "step-0000000008").is_dir()


def test_another_model_is_refused_with_all_differences_at_once(tmp_path: Path) -> None:
    class Other(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.head = nn.Linear(8, 2)
            self.model.extra = nn.Linear(1, 1)
            self.model.embed = nn.Linear(4, 8, dtype=torch.float64)  # type: ignore[assignment]
            del self.model.blocks[1]

    tiny(tmp_path).fit()
    trainer = tiny(tmp_path, kind=Other)

    with pytest.raises(CheckpointError) as caught:
        trainer.setup()

    lines = str(caught.value).splitlines()
    assert len(lines) <= 15
    text = str(caught.value)
    assert "only in the checkpoint: models.model.blocks.1.bias" in text
    assert "only in the trainer: models.model.extra.bias" in text
    assert "or another experiment name" in text
    assert "models.model.head.weight [1, 8] → [2, 8]" in text
    assert "models.model.embed.weight torch.float32 → torch.float64" in text
    assert "strict_load=False" in text


def test_strict_load_false_loads_what_matches(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Other(TinyTrainer):
        def configure_models(self) -> None:
            super().configure_models()
            self.model.head = nn.Linear(8, 2)

    first = tiny(tmp_path)
    first.fit()
    fresh = tiny(tmp_path / "fresh", kind=Other)
    fresh.setup()

    trainer = tiny(tmp_path, kind=Other, strict_load=False)
    trainer.setup()

    found, before, loaded = weights(trainer), weights(first), weights(fresh)
    heads = ["model.head.bias", "model.head.weight"]
    assert different(found, before) == heads
    assert all(torch.equal(found[name], loaded[name]) for name in heads)
    assert trainer.global_step == 16
    assert "of another shape: models.model.head.weight" in caplog.text


def test_resume_data_false_restarts_the_epoch(tmp_path: Path) -> None:
    history = History()
    with pytest.raises(PlannedError):
        tiny(tmp_path, history, CrashAt(11), every=Every(steps=2)).fit()

    trainer = tiny(tmp_path, history, every=Every(steps=2), resume_data=False)
    trainer.setup()

    assert (trainer.global_step, trainer.current_epoch) == (10, 1)
    assert trainer.counters.epoch_batches == 0
    trainer.fit()
    assert trainer.global_step == 18


def test_a_position_beyond_the_changed_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlannedError):
        tiny(tmp_path, CrashAt(7), every=Every(steps=2)).fit()
    trainer = tiny(tmp_path, training={"train_steps_per_epoch": 4})

    with pytest.raises(CheckpointError, match=r"6 batches of the epoch are done, and .* has 4 now"):
        trainer.setup()


# With other callbacks


@pytest.mark.parametrize("is_listed_after", [False, True], ids=["before", "after"])
def test_weights_and_moving_average_are_saved_separately(
    tmp_path: Path, is_listed_after: bool
) -> None:
    def averaged(n_epochs: int, root: Path) -> tuple[TinyTrainer, Average]:
        average = Average()
        trainer = tiny(root, n_epochs=n_epochs, every=Every(steps=3))
        if is_listed_after:
            trainer.callbacks.append(average)
        else:
            callback = trainer.callbacks.pop("CheckpointCallback")
            trainer.callbacks.append(average)
            trainer.callbacks.append(callback)
        return trainer, average

    uninterrupted, expected = averaged(2, tmp_path / "uninterrupted")
    uninterrupted.fit()
    stopped, _ = averaged(1, tmp_path / "stopped")
    stopped.fit()

    trainer, found = averaged(2, tmp_path / "stopped")
    trainer.setup()
    assert found.steps == 8
    assert different(weights(trainer), {f"model.{n}": t for n, t in found.average.items()})
    trainer.fit()

    assert found.steps == 16
    assert not different(found.average, expected.average)
    assert not different(weights(trainer), weights(uninterrupted))


def averaging(layout: str, is_listed_after: bool) -> TinyTrainer:
    trainer: TinyTrainer = make(Path("runs"), kind=TinyTrainer, layout=layout)
    trainer.callbacks.append(Average())
    if not is_listed_after:
        trainer.callbacks.append(trainer.callbacks.pop("CheckpointCallback"))
    return trainer


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
@pytest.mark.parametrize("is_listed_after", [False, True], ids=["before", "after"])
def test_weights_and_moving_average_are_restored_on_two_ranks(
    tmp_path: Path, layout: str, is_listed_after: bool
) -> None:
    make_trainer = functools.partial(averaging, layout, is_listed_after)

    prove(make_trainer, tmp_path, steps=3, num_ranks=2).check()

    filesystem = LocalFilesystem(directory(tmp_path / "stopped"))
    newest = SavedState(filesystem, read_catalog(filesystem).checkpoints[-1])
    names = ("models.model.head.weight", "trainer.callbacks.Average.average.head.weight")
    weight, average = (newest.new_tensor(name) for name in names)
    newest.read(dict(zip(names, (weight, average), strict=True)))
    assert weight.shape == average.shape
    assert not torch.equal(weight, average)


def test_it_runs_after_all_other_callbacks(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, Average(), History())

    plan = trainer.callbacks.plan()

    assert plan.hooks["post_train_step"] == ("Average", "History", "CheckpointCallback")
    assert plan.hooks["post_setup"] == ("Average", "CheckpointCallback")


def test_a_state_that_cannot_be_loaded_is_not_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Careless(Callback[Any]):
        def state_dict(self) -> dict[str, Any]:
            return {"path": Path("x")}

    tiny(tmp_path, Careless()).fit()

    assert steps(tmp_path) == []
    assert "the state of callback Careless holds" in caplog.text
    assert "state_dict()['path']" in caplog.text
    assert "there is none yet; training continues" in caplog.text, "no advice about the disk"


def test_two_callbacks_with_one_directory_are_refused(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, CheckpointCallback(CheckpointParameters(every=Every(steps=5))))

    with pytest.raises(CheckpointError, match=r"CheckpointCallback_2 writes to .* too"):
        trainer.setup()


def test_two_callbacks_with_different_directories_work(tmp_path: Path) -> None:
    second = CheckpointParameters(root_dir=tmp_path / "second", every=Every(steps=4))

    tiny(tmp_path / "first", CheckpointCallback(second)).fit()

    assert steps(tmp_path / "first") == [8, 16]
    assert checkpoints(tmp_path / "second") == [
        "step-0000000008",
        "step-0000000012",
        "step-0000000016",
    ]


# Life cycle


def test_a_second_fit_continues(tmp_path: Path) -> None:
    trainer = tiny(tmp_path, n_epochs=1)
    trainer.fit()
    trainer.training_parameters.n_epochs = 3

    trainer.fit()

    assert steps(tmp_path) == [8, 16, 24]


def test_a_copy_is_independent(tmp_path: Path) -> None:
    callback = CheckpointCallback(CheckpointParameters(every=Every(steps=4)))
    trainer = tiny(tmp_path / "first", n_epochs=1, enable=False)
    trainer.callbacks["CheckpointCallback"] = callback
    trainer.fit()

    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        other = tiny(tmp_path / "other", n_epochs=1, enable=False)
        other.callbacks["CheckpointCallback"] = twin
        other.fit()

        assert twin.parameters == callback.parameters
        assert steps(tmp_path / "other") == [4, 8]


def test_an_error_before_training_releases_the_directory(tmp_path: Path) -> None:
    class Fails(Callback[Any]):
        after = {CheckpointCallback}

        def pre_fit(self) -> None:
            raise PlannedError

    with pytest.raises(PlannedError):
        tiny(tmp_path, Fails()).fit()

    tiny(tmp_path).fit()
    assert steps(tmp_path) == [8, 16]


def test_a_second_trainer_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    class StartsAnother(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            with pytest.raises(CheckpointError, match="in use by another trainer of this process"):
                tiny(tmp_path).fit()

    tiny(tmp_path, StartsAnother(), training={"max_steps": 1}).fit()


def test_a_run_overtaken_after_set_up_is_refused(tmp_path: Path) -> None:
    trainer = tiny(tmp_path)
    trainer.setup()
    tiny(tmp_path).fit()

    with pytest.raises(CheckpointError, match="another run has saved there after"):
        trainer.fit()


def test_manifests_are_read_once_unless_another_run_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(tmp_path).fit()
    read: list[str] = []
    read_file = LocalFilesystem.read

    def noting(
        filesystem: LocalFilesystem, folder: str, name: str, max_bytes: int | None = None
    ) -> bytes:
        read.extend([folder] if name == "MANIFEST.json" else [])
        return read_file(filesystem, folder, name, max_bytes)

    monkeypatch.setattr(LocalFilesystem, "read", noting)

    tiny(tmp_path, n_epochs=2).fit()
    alone = sorted(read)
    read.clear()
    trainer = tiny(tmp_path, n_epochs=3)
    trainer.setup()
    assert main(["prune", "--keep-last", "1", str(directory(tmp_path))]) == 0
    read.clear()
    trainer.fit()

    assert alone == ["step-0000000008", "step-0000000016"]
    assert read == ["step-0000000016"]
    assert steps(tmp_path) == [16, 24]


def test_save_on_exception_saves_between_two_steps(tmp_path: Path) -> None:
    class FailsBetween(Callback[Any]):
        def pre_epoch(self) -> None:
            if self.trainer.current_epoch == 1:
                raise PlannedError

    with pytest.raises(PlannedError):
        tiny(tmp_path, FailsBetween(), every=Every(steps=100), save_on_exception=True).fit()

    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(8, "PlannedError")]


def test_save_on_exception_never_saves_within_a_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FailsInside(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            result = super().training_step(batch, batch_idx)
            if self.global_step == 3:
                raise PlannedError
            return result

    with pytest.raises(PlannedError):
        tiny(tmp_path, kind=FailsInside, every=Every(steps=2), save_on_exception=True).fit()

    assert steps(tmp_path) == [2]
    assert "the error came inside a step; the newest checkpoint is that of step 2" in caplog.text


def test_without_save_on_exception_nothing_is_saved(tmp_path: Path) -> None:
    with pytest.raises(PlannedError):
        tiny(tmp_path, CrashAt(11)).fit()

    assert steps(tmp_path) == [8]


class Unused(TinyTrainer):
    """A parameter that gets its first gradient in step 11."""

    def configure_models(self) -> None:
        super().configure_models()
        self.model.late = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        if self.global_step >= 10:
            self.backward(self.model.late.square().sum())  # type: ignore[operator,union-attr]
        return super().training_step(batch, batch_idx)


def test_a_parameter_without_gradients_resumes_exactly(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"kind": Unused, "every": Every(steps=5)}
    uninterrupted = tiny(tmp_path / "uninterrupted", **fields)
    uninterrupted.fit()
    with pytest.raises(PlannedError):
        tiny(tmp_path / "stopped", CrashAt(7), **fields).fit()

    trainer = tiny(tmp_path / "stopped", **fields)
    trainer.fit()

    assert not different(weights(trainer), weights(uninterrupted))
    assert not different(moments(trainer), moments(uninterrupted))


class Averaging(TinyTrainer):
    """An optimizer whose state grows: it averages from step 4 on."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.ASGD(self.model.parameters(), lr=0.01)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        if self.global_step == 3:
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["kept"] = parameter.detach().clone()
                self.optimizer.state[parameter]["count"] = torch.tensor([3.0, 4.0])
        return result


@pytest.mark.parametrize("layout", ["single", "fsdp"])
def test_optimizer_state_created_during_training_is_restored(tmp_path: Path, layout: str) -> None:
    if layout == "fsdp":
        pairs = run_on_ranks(growing, 2, tmp_path, layout)
    else:
        pairs = [growing(tmp_path, layout)]

    for uninterrupted, resumed in pairs:
        assert not different(uninterrupted, resumed)
        assert "optimizer.embed.weight.kept" in resumed


def growing(root: Path, layout: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    fields: dict[str, Any] = {"kind": Averaging, "every": Every(steps=5), "layout": layout}
    uninterrupted = tiny(root / "uninterrupted", **fields)
    uninterrupted.fit()
    with pytest.raises(PlannedError):
        tiny(root / "stopped", CrashAt(7), **fields).fit()
    trainer = tiny(root / "stopped", **fields)
    trainer.fit()
    return moments(uninterrupted), moments(trainer)


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
        lambda parameters: torch.optim.Adagrad(parameters),
        lambda parameters: torch.optim.RMSprop(parameters, centered=True, momentum=0.1),
        lambda parameters: torch.optim.NAdam(parameters),
        lambda parameters: torch.optim.Rprop(parameters),
        lambda parameters: torch.optim.Adamax(parameters),
        lambda parameters: torch.optim.Adafactor(parameters),
    ],
    ids=[
        "SGD",
        "momentum",
        "amsgrad",
        "Adagrad",
        "RMSprop",
        "NAdam",
        "Rprop",
        "Adamax",
        "Adafactor",
    ],
)
def test_every_optimizer_of_torch_resumes_bit_for_bit(tmp_path: Path, make_optimizer: Any) -> None:
    class Other(TinyTrainer):
        def configure_optimizers(self) -> None:
            self.optimizer = make_optimizer(self.model.parameters())

    fields: dict[str, Any] = {"kind": Other, "every": Every(steps=5)}
    uninterrupted = tiny(tmp_path / "uninterrupted", **fields)
    uninterrupted.fit()
    with pytest.raises(PlannedError):
        tiny(tmp_path / "stopped", CrashAt(7), **fields).fit()

    trainer = tiny(tmp_path / "stopped", **fields)
    trainer.fit()

    assert not different(weights(trainer), weights(uninterrupted))
    assert not different(moments(trainer), moments(uninterrupted))


@pytest.mark.parametrize("name", ["with space", "ünï-cödé", "a'b\"c", "x" * 200])
def test_any_directory_name_works(tmp_path: Path, name: str) -> None:
    tiny(tmp_path / name, n_epochs=1).fit()

    trainer = tiny(tmp_path / name, n_epochs=1)
    trainer.setup()

    assert trainer.global_step == 8
