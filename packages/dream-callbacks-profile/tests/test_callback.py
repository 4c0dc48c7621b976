"""ProfileCallback on real runs: what is recorded and where it is written."""

from __future__ import annotations

import copy
import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerAction, profile, record_function, schedule

from dream_callbacks.profile import ProfileCallback
from dream_trainer.callbacks import Callback
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config

# torch 2.11 warns once per process, at the first recording of a user profiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events")


class LabelledTrainer(TinyTrainer):
    """Labels each training and validation batch in a trace."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        with record_function("my training"):
            return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        with record_function("my validation"):
            return super().validation_step(batch, batch_idx)


class Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(float(result["loss"]))


class FailAt(Callback):
    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            raise ArithmeticError("on purpose")


def fit(tmp_path: Path, *callbacks: Callback, **training: Any) -> LabelledTrainer:
    trainer = LabelledTrainer(tiny_config(tmp_path, callbacks, **training))
    trainer.fit()
    return trainer


def names_in(trace: Path) -> list[str]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def steps_in(trace: Path) -> list[str]:
    return sorted({name for name in names_in(trace) if name.startswith("ProfilerStep#")})


def test_the_default_is_one_gzipped_trace_of_three_steps_in_the_run_directory(tmp_path):
    callback = ProfileCallback()

    trainer = fit(tmp_path, callback, n_epochs=2, val_steps_per_epoch=0)

    (trace,) = (trainer.run_dir / "profile").iterdir()
    assert callback.traces == (trace,)
    assert trace.name.startswith("rank0.")
    assert trace.name.endswith(".pt.trace.json.gz")
    assert names_in(trace).count("my training") == 3


def test_options_select_the_recorded_steps(tmp_path):
    callback = ProfileCallback(skip_first=1, wait=1, warmup=1, active=2, repeat=2)

    fit(tmp_path, callback, n_epochs=2, val_steps_per_epoch=0)

    assert [steps_in(trace) for trace in callback.traces] == [
        ["ProfilerStep#3", "ProfilerStep#4"],
        ["ProfilerStep#7", "ProfilerStep#8"],
    ]


def test_a_step_is_an_optimizer_step_with_all_its_batches(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=1, active=1)

    fit(tmp_path, callback, gradient_accumulation_steps=3)

    (trace,) = callback.traces
    assert steps_in(trace) == ["ProfilerStep#1"]
    assert names_in(trace).count("my training") == 3


def test_losses_are_the_same_with_and_without_it(tmp_path):
    with_profile, without = Losses(), Losses()

    fit(tmp_path, ProfileCallback(skip_first=0), with_profile, n_epochs=2)
    fit(tmp_path, without, n_epochs=2)

    assert with_profile.seen == without.seen
    assert len(without.seen) == 16


def test_after_its_schedule_another_profiler_can_record_in_the_same_run(tmp_path):
    class Later(Callback):
        def __init__(self) -> None:
            self.profiler = profile()

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 4:
                self.profiler.start()
            if self.trainer.global_step == 6:
                self.profiler.stop()

    callback, later = ProfileCallback(skip_first=0, warmup=1, active=2), Later()

    fit(tmp_path, callback, later)

    assert len(callback.traces) == 1
    recorded = {event.key: event.count for event in later.profiler.key_averages()}
    assert recorded["my training"] == 2


def test_validation_splits_the_trace_and_is_not_recorded(tmp_path):
    callback = ProfileCallback(skip_first=2, warmup=1, active=4)

    fit(tmp_path, callback, val_every_n_steps=5)

    assert [names_in(trace).count("my training") for trace in callback.traces] == [2, 2]
    assert not any("my validation" in names_in(trace) for trace in callback.traces)


@pytest.mark.filterwarnings("ignore:.*using warmup")
def test_sanity_validation_is_not_recorded(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=0, active=1)

    fit(tmp_path, callback, num_sanity_val_steps=1)

    (trace,) = callback.traces
    assert "my validation" not in names_in(trace)


def test_a_user_profiler_is_started_once_and_calls_its_own_handler(tmp_path):
    ready: list[tuple[int, int]] = []
    profiler = profile(
        schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda p: ready.append((p.step_num, len(p.events()))),
    )

    trainer = fit(tmp_path, ProfileCallback(profiler))

    assert [step for step, _ in ready] == [5]
    assert ready[0][1] > 100
    assert profiler.step_num == 8
    assert not (trainer.run_dir / "profile").exists()


def test_a_user_profiler_without_a_handler_writes_traces(tmp_path):
    callback = ProfileCallback(profile(), output_dir=tmp_path / "elsewhere")

    fit(tmp_path, callback)

    (trace,) = callback.traces
    assert trace.parent == tmp_path / "elsewhere"
    assert names_in(trace).count("my training") == 8


def test_a_run_that_ends_before_the_recording_warns_which_options_to_lower(tmp_path, caplog):
    fit(tmp_path, ProfileCallback(skip_first=20))

    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "ended after 8 optimizer steps" in record.message
    assert "number 23" in record.message
    assert "skip_first=20" in record.message


def test_a_run_that_had_already_finished_does_not_warn(tmp_path, caplog):
    trainer = fit(tmp_path, ProfileCallback(skip_first=20))
    caplog.clear()
    trainer.fit()

    ours = [r for r in caplog.records if r.name.startswith("dream_callbacks.")]
    assert [r.message for r in ours if r.levelno == logging.WARNING] == []


def test_a_run_that_ends_during_the_recording_keeps_a_shorter_trace(tmp_path):
    callback = ProfileCallback(skip_first=4, warmup=1, active=100)

    fit(tmp_path, callback, val_steps_per_epoch=0)

    (trace,) = callback.traces
    assert names_in(trace).count("my training") == 3


def test_an_error_during_the_recording_keeps_the_trace_and_stops_the_profiler(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=1, active=100)

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, FailAt(4), callback)

    (trace,) = callback.traces
    assert names_in(trace).count("my training") == 4
    with profile() as after:
        torch.ones(2).sin()
    assert "aten::sin" in {event.key for event in after.key_averages()}


def test_an_error_during_validation_keeps_the_trace(tmp_path):
    class FailInValidation(Callback):
        def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
            raise ArithmeticError("on purpose")

    callback = ProfileCallback(skip_first=0, warmup=1, active=100)

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, FailInValidation(), callback, val_every_n_steps=3)

    (trace,) = callback.traces
    assert names_in(trace).count("my training") == 2


def test_an_error_before_pre_fit_records_nothing(tmp_path):
    class FailEarly(Callback):
        def pre_fit(self) -> None:
            raise ArithmeticError("on purpose")

    callback = ProfileCallback()

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, FailEarly(), callback)

    assert callback.traces == ()
    assert callback.report() == "no trace was recorded on this rank"


def test_a_second_fit_profiles_its_own_steps(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=1, active=2)
    trainer = fit(tmp_path, callback)

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert [names_in(trace).count("my training") for trace in callback.traces] == [2, 2]


def test_a_user_profiler_continues_in_a_second_fit(tmp_path):
    ready: list[int] = []
    profiler = profile(
        schedule=schedule(wait=8, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda p: ready.append(p.step_num),
    )
    trainer = fit(tmp_path, ProfileCallback(profiler))
    assert ready == []

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert ready == [11]


def test_an_error_in_the_handler_of_a_user_profiler_is_raised(tmp_path):
    def handler(profiler: profile) -> None:
        raise ArithmeticError("on purpose")

    profiler = profile(schedule=schedule(wait=0, warmup=1, active=1), on_trace_ready=handler)

    with pytest.raises(ArithmeticError, match="on purpose"):
        fit(tmp_path, ProfileCallback(profiler))

    assert profiler.step_num == 2


def test_a_directory_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    callback = ProfileCallback(skip_first=0, warmup=1, output_dir=tmp_path / "file" / "profile")

    trainer = fit(tmp_path, callback)

    assert trainer.global_step == 8
    assert callback.traces == ()
    assert "couldn't be written" in caplog.text


def test_a_second_profile_callback_for_the_same_rank_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="ProfileCallback_2"):
        fit(tmp_path, ProfileCallback(), ProfileCallback(wait=4))


def test_a_profiler_around_fit_is_rejected(tmp_path):
    with profile(), pytest.raises(RuntimeError, match="already recording"):
        fit(tmp_path, ProfileCallback())


def test_a_copy_has_no_recordings_of_the_original(tmp_path):
    original = ProfileCallback(profile(schedule=schedule(wait=0, warmup=1, active=2)))
    fit(tmp_path / "original", original)
    num_traces = len(original.traces)

    copied = copy.deepcopy(original)
    fit(tmp_path / "copied", copied)

    assert num_traces > 0
    assert len(original.traces) == num_traces
    assert len(copied.traces) > num_traces


def test_the_report_shows_where_traces_are_and_how_to_view_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    callback = ProfileCallback(skip_first=0)

    trainer = fit(tmp_path, callback)

    assert f"tensorboard --logdir '{trainer.run_dir / 'profile'}'" in callback.report()
    assert callback.report() in caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0}, "active=0"),
        ({"wait": -1}, "wait=-1"),
        ({"repeat": 0}, "repeat=0"),
        ({"skip_first": 1.5}, "skip_first=1.5"),
        ({"ranks": (-1,)}, "ranks="),
        ({"profiler": profile(), "wait": 1}, "profiler can't be combined"),
        ({"profiler": profile(), "with_stack": True}, "profiler can't be combined"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_invalid_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        ProfileCallback(**options)


def test_a_trace_is_numbered_by_the_steps_of_the_run(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=1, active=2)
    trainer = fit(tmp_path, callback)

    trainer.training_parameters.n_epochs = 2
    trainer.fit()

    assert [steps_in(trace) for trace in callback.traces] == [
        ["ProfilerStep#1", "ProfilerStep#2"],
        ["ProfilerStep#10", "ProfilerStep#9"],
    ]


@pytest.mark.filterwarnings("ignore:.*using warmup")
def test_consecutive_recordings_are_separate_traces(tmp_path):
    callback = ProfileCallback(skip_first=0, warmup=0, active=2, repeat=3)

    fit(tmp_path, callback)

    assert [names_in(trace).count("my training") for trace in callback.traces] == [2, 2, 2]


def test_windows_count_steps_as_torch_does():
    windows = ProfileCallback(skip_first=3, wait=2, warmup=1, active=4, repeat=2).windows

    action = windows.schedule()

    does_something = [n for n in range(100) if action(n) is not ProfilerAction.NONE]
    records = [n for n in does_something if action(n) is not ProfilerAction.WARMUP]
    assert does_something[-1] == windows.num_steps - 1
    assert records[0] == windows.num_steps_before


def _profiled_rank(root_dir: str, ranks: tuple[int, ...] | None) -> list[str]:
    callback = ProfileCallback(skip_first=0, warmup=1, active=2, ranks=ranks)
    fit(Path(root_dir), callback, n_epochs=1)
    return [trace.name.split(".")[0] for trace in callback.traces]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((0,), [["rank0"], []]), ((1,), [[], ["rank1"]]), (None, [["rank0"], ["rank1"]])],
    ids=["rank 0", "rank 1", "all"],
)
def test_only_selected_ranks_are_profiled(tmp_path, ranks, expected):
    assert run_on_ranks(_profiled_rank, 2, str(tmp_path), ranks) == expected
