from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dream_callbacks.logging import (
    DeferredSink,
    JSONLinesSink,
    LoggedRun,
    LoggerCallback,
    LRLoggerCallback,
    MediaLoggerCallback,
    MetricLoggerCallback,
    ModelWatchCallback,
    OpenedSink,
    read_jsonl,
    series,
)
from dream_trainer.callbacks import Callback
from dream_trainer.configs import WandbLoggingParameters
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import WeightedMean


class Recorder(Callback[Any]):
    """Records the losses that training_step returned."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.losses.append(result["loss"].item())


class MemorySink(OpenedSink):
    """An open sink that records its calls."""

    def __init__(self) -> None:
        self.scalars: list[tuple[dict[str, float], int]] = []
        self.num_closed = 0

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.scalars.append((dict(values), step))

    def close(self, error: BaseException | None = None) -> None:
        self.num_closed += 1


class FailingSink(DeferredSink):
    def open(self, run: LoggedRun) -> OpenedSink:
        raise PermissionError("not here")


def fitted(tmp_path, *callbacks: Callback[Any], **training: Any) -> TinyTrainer:
    trainer = TinyTrainer(tiny_config(tmp_path, callbacks, **training))
    trainer.fit()
    return trainer


def test_json_lines_in_the_run_directory_are_the_default(tmp_path):
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder, LoggerCallback(1), n_epochs=2)

    rows = read_jsonl(trainer.run_dir)
    assert series(rows, "train/loss") == (list(range(1, 17)), recorder.losses)
    assert series(rows, "epoch") == (list(range(1, 17)), [n / 8 for n in range(1, 17)])
    assert series(rows, "epoch/loss")[0] == series(rows, "val_loss")[0] == [8, 16]
    assert series(rows, "epoch/loss")[1][0] == pytest.approx(sum(recorder.losses[:8]) / 8)
    assert all(rate > 0 for rate in series(rows, "steps_per_s")[1])
    assert [path.name for path in trainer.run_dir.iterdir()] == ["log.jsonl"]


def test_by_default_the_first_batch_and_every_50th_are_logged(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(), LRLoggerCallback(), n_epochs=13)

    rows = read_jsonl(trainer.run_dir)
    assert trainer.global_step == 104
    assert series(rows, "train/loss")[0] == series(rows, "lr")[0] == [1, 50, 100]


def test_by_default_the_step_that_contains_the_first_batch_is_logged(tmp_path):
    accumulation = {"gradient_accumulation_steps": 3, "n_epochs": 7}
    trainer = fitted(tmp_path, LoggerCallback(), LRLoggerCallback(), **accumulation)

    rows = read_jsonl(trainer.run_dir)
    # 8 batches make 3 steps; batch 50 is the second of the 7th epoch.
    assert series(rows, "train/loss")[0] == series(rows, "lr")[0] == [1, 19]


def test_by_default_the_first_batch_of_a_continued_run_is_not_logged(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(), max_steps=3)
    trainer.config.training_parameters.max_steps = 60
    trainer.config.training_parameters.n_epochs = 8
    trainer.fit()

    assert series(read_jsonl(trainer.run_dir), "train/loss")[0] == [1, 50]


def test_every_nth_batch_is_logged_over_epochs(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(5), n_epochs=2)

    assert series(read_jsonl(trainer.run_dir), "train/loss")[0] == [5, 10, 15]


def test_none_disables_logging_of_batches(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(None))

    rows = read_jsonl(trainer.run_dir)
    assert series(rows, "train/loss") == ([], [])
    assert series(rows, "epoch/loss")[0] == [8]


def test_an_accumulated_step_logs_the_mean_of_its_batches(tmp_path):
    recorder = Recorder()
    trainer = fitted(tmp_path, recorder, LoggerCallback(1), gradient_accumulation_steps=3)

    steps, losses = series(read_jsonl(trainer.run_dir), "train/loss")
    parts = [recorder.losses[0:3], recorder.losses[3:6], recorder.losses[6:8]]
    assert steps == [1, 2, 3]
    assert losses == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-12)


def test_a_step_that_contains_an_nth_batch_is_logged_once(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(4), gradient_accumulation_steps=3)

    # Batches 4 and 8 are in steps 2 and 3.
    assert series(read_jsonl(trainer.run_dir), "train/loss")[0] == [2, 3]


class LastBatchNorm(TinyTrainer):
    """Reports a norm only with the last batch of a step."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        loss = torch.nn.functional.mse_loss(self.model(batch[0]), batch[1])
        self.backward(loss)
        if self.is_accumulating_gradients:
            return {"loss": loss}
        return {"loss": loss, "norm": self.step(self.optimizer), "text": "x", "count": 3}


def test_a_value_of_some_batches_of_a_step_is_averaged_over_those_batches(tmp_path):
    training = {"gradient_accumulation_steps": 2, "gradient_clip_val": float("inf")}
    trainer = LastBatchNorm(tiny_config(tmp_path, [LoggerCallback(1)], **training))
    trainer.fit()

    rows = read_jsonl(trainer.run_dir)
    assert len(series(rows, "train/norm")[1]) == 4
    assert series(rows, "train/count")[1] == [3.0] * 4
    assert not series(rows, "train/text")[1]


def test_validation_batches_have_their_own_index(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(None, 2), n_epochs=2)

    rows = read_jsonl(trainer.run_dir)
    steps, indices = series(rows, "val_batch/index")
    assert (steps, indices) == ([8, 16], [2, 4])
    assert len(series(rows, "val_batch/val_loss")[1]) == 2


def test_a_sanity_validation_is_not_logged(tmp_path):
    callbacks = LoggerCallback(1, log_every_n_val_batches=1), MetricLoggerCallback()
    trainer = fitted(tmp_path, *callbacks, num_sanity_val_steps=2, max_steps=2)

    assert series(read_jsonl(trainer.run_dir), "val_loss")[0] == [2]
    assert series(read_jsonl(trainer.run_dir), "val_batch/index")[1] == [1, 2]


def test_two_fits_write_one_history_without_gaps(tmp_path):
    trainer = fitted(tmp_path, LoggerCallback(1), LRLoggerCallback(), max_steps=3)
    trainer.config.training_parameters.max_steps = 7
    trainer.fit()

    rows = read_jsonl(trainer.run_dir)
    assert series(rows, "train/loss")[0] == series(rows, "lr")[0] == list(range(1, 8))
    assert [line["step"] for line in read_jsonl(trainer.run_dir, "start")] == [0, 3]
    assert trainer.sinks == ()


def test_a_run_that_crashed_and_resumed_has_one_history(tmp_path):
    states: list[Any] = []

    class Crash(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if self.trainer.global_step == 3:
                states.append(copy.deepcopy(self.trainer.state_dict()))
            if self.trainer.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, LoggerCallback(1), LRLoggerCallback(), Crash())
    resumed = TinyTrainer(tiny_config(tmp_path, [LoggerCallback(1), LRLoggerCallback()]))
    resumed.setup()
    resumed.load_state_dict(states[0])
    resumed.fit()
    whole = fitted(tmp_path / "whole", LoggerCallback(1))

    rows = read_jsonl(resumed.run_dir)
    assert series(rows, "train/loss") == series(read_jsonl(whole.run_dir), "train/loss")
    assert series(rows, "lr")[0] == list(range(1, 9))
    assert [line["error"] for line in read_jsonl(resumed.run_dir, "end")] == [
        "KeyboardInterrupt: ",
        None,
    ]


def test_a_sink_that_is_already_open_is_not_closed(tmp_path):
    sink = MemorySink()
    trainer = fitted(tmp_path, LoggerCallback(1, sinks=[sink]), max_steps=2)

    assert [step for values, step in sink.scalars if "train/loss" in values] == [1, 2]
    assert sink.num_closed == 0
    assert trainer.sinks == ()
    assert not trainer.run_dir.exists()


def test_ctrl_c_while_a_sink_is_closed_closes_the_others(tmp_path):
    closed: list[str] = []

    class Tracker(DeferredSink):
        def __init__(self, name: str) -> None:
            self.name = name

        def open(self, run: LoggedRun) -> OpenedSink:
            return Tracked(self.name)

    class Tracked(OpenedSink):
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self, error: BaseException | None = None) -> None:
            closed.append(self.name)
            if self.name == "second":
                raise KeyboardInterrupt

    callback = LoggerCallback(1, sinks=[Tracker("first"), Tracker("second"), Tracker("third")])

    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path, callback, max_steps=1)

    assert closed == ["third", "second", "first"]


def test_json_lines_are_added_to_a_sink_that_does_not_survive_a_crash(tmp_path):
    class Tracker(DeferredSink):
        survives_crash = False

        def open(self, run: LoggedRun) -> OpenedSink:
            return MemorySink()

    alone = fitted(tmp_path / "alone", LoggerCallback(1, sinks=[Tracker()]), max_steps=2)
    beside = LoggerCallback(1, sinks=[Tracker(), JSONLinesSink("own.jsonl")])
    other = fitted(tmp_path / "other", beside, max_steps=2)

    assert [path.name for path in alone.run_dir.iterdir()] == ["log.jsonl"]
    assert [path.name for path in other.run_dir.iterdir()] == ["own.jsonl"]


def test_the_config_and_the_code_are_logged(tmp_path):
    (tmp_path / "train.py").write_text("x")
    trainer = fitted(tmp_path, LoggerCallback(code_dir=tmp_path), max_steps=1)

    (config,) = read_jsonl(trainer.run_dir, "config")
    assert config["config"]["training_parameters"]["max_steps"] == 1
    (code,) = read_jsonl(trainer.run_dir, "code")
    assert code["num_files"] == 1


def test_wandb_is_not_used_unless_the_config_enables_it(tmp_path):
    config = tiny_config(tmp_path, [LoggerCallback(1)])
    config.logging_parameters = WandbLoggingParameters(enabled=False)
    trainer = TinyTrainer(config)
    trainer.fit()

    assert not (trainer.run_dir / "wandb").exists()


def test_a_sink_that_cannot_be_opened_ends_the_run_before_the_first_batch(tmp_path):
    recorder = Recorder()
    memory = MemorySink()
    logger = LoggerCallback(1, sinks=[memory, FailingSink()])
    trainer = TinyTrainer(tiny_config(tmp_path, [logger, recorder]))

    with pytest.raises(PermissionError, match="not here"):
        trainer.fit()
    assert recorder.losses == []
    assert trainer.sinks == ()


def test_an_error_before_its_pre_fit_is_reported(tmp_path):
    class Failing(Callback[Any]):
        def pre_fit(self) -> None:
            raise RuntimeError("first")

    with pytest.raises(RuntimeError, match="first"):
        fitted(tmp_path, Failing(), LoggerCallback(1))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_made_during_a_run_logs_independently(tmp_path, copied):
    copies: list[LoggerCallback] = []

    class Copy(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            copies.append(copied(logger))

    logger = LoggerCallback(2, sinks=[JSONLinesSink("own.jsonl")])
    fitted(tmp_path / "first", logger, Copy(), max_steps=3)
    second = fitted(tmp_path / "second", copies[1], max_steps=4)

    assert series(read_jsonl(second.run_dir / "own.jsonl"), "train/loss")[0] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_every_n_train_batches": 0}, ValueError, "log_every_n_train_batches=0"),
        ({"log_every_n_train_batches": "all"}, ValueError, "log_every_n_train_batches='all'"),
        ({"log_every_n_val_batches": 1.5}, ValueError, "log_every_n_val_batches=1.5"),
        ({"reduce": "sum"}, ValueError, "reduce='sum': \"mean\" or None"),
        ({"sinks": [JSONLinesSink]}, TypeError, r"isn't a sink; it is a class, add \(\)"),
        ({"sinks": ["log.jsonl"]}, TypeError, "'log.jsonl' isn't a sink"),
        ({"sinks": JSONLinesSink()}, TypeError, "a list of sinks is required"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, error, message):
    with pytest.raises(error, match=message):
        LoggerCallback(**arguments)


# Host synchronization


class CountReads(TorchDispatchMode):
    """Counts how often a single number is read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_reads += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def num_reads(directory, *callbacks: Callback[Any]) -> int:
    config = tiny_config(directory, callbacks, val_every_n_steps=0)
    config.num_samples = 200
    trainer = TinyTrainer(config)
    with CountReads() as counter:
        trainer.fit()
    assert trainer.global_step == 50
    return counter.num_reads


def test_no_step_reads_a_single_number_on_the_host(tmp_path):
    callbacks = [
        LoggerCallback(16),
        LRLoggerCallback(),
        MetricLoggerCallback(),
        MediaLoggerCallback(),
        ModelWatchCallback("all", 16),
    ]

    # AdamW reads its own step counters on the CPU.
    assert num_reads(tmp_path / "with", *callbacks) == num_reads(tmp_path / "without")
    (path,) = (tmp_path / "with").glob("**/log.jsonl")
    assert series(read_jsonl(path), "train/loss")[0] == [16, 32, 48]
    assert series(read_jsonl(path), "gradient_norm")[0] == [16, 32, 48]


class CountTouches(TorchDispatchMode):
    """Counts operations by the number of steps done."""

    def __init__(self, trainer: TinyTrainer) -> None:
        super().__init__()
        self.trainer = trainer
        self.num_operations: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        step = self.trainer.global_step
        self.num_operations[step] = self.num_operations.get(step, 0) + 1
        return func(*args, **(kwargs or {}))


def test_steps_that_do_not_log_run_no_tensor_operation(tmp_path):
    def operations(*callbacks: Callback[Any]) -> dict[int, int]:
        trainer = TinyTrainer(tiny_config(tmp_path, callbacks, max_steps=8))
        with CountTouches(trainer) as counter:
            trainer.fit()
        return counter.num_operations

    without = operations()
    logged = operations(LoggerCallback(4), LRLoggerCallback(), ModelWatchCallback("all", 4))

    # Operations of step 4 count for 3 in the optimizer's hooks, and for 4 after the step.
    assert {step for step in range(1, 8) if logged[step] != without[step]} == {3, 4, 7}


# Ranks


def train_on_ranks(directory, reduce):
    recorder = Recorder()
    trainer = fitted(directory, LoggerCallback(1, reduce=reduce), recorder)
    return trainer.run_dir, recorder.losses, len(trainer.sinks)


@pytest.mark.parametrize("reduce", ["mean", None])
def test_the_loss_of_two_ranks_is_the_loss_of_the_global_batch(tmp_path, reduce):
    whole = fitted(tmp_path / "whole", LoggerCallback(1))
    (run_dir, own, _), (_, others, _) = run_on_ranks(train_on_ranks, 2, tmp_path / "ranks", reduce)

    steps, losses = series(read_jsonl(run_dir), "train/loss")
    means = [(a + b) / 2 for a, b in zip(own, others, strict=True)]
    assert losses == pytest.approx(means if reduce else own, rel=1e-12)
    assert steps == list(range(1, 9))
    if reduce:
        global_losses = series(read_jsonl(whole.run_dir), "train/loss")[1]
        assert losses == pytest.approx(global_losses, abs=1e-6)  # the sums have another order


class TaskTrainer(TinyTrainer):
    """The task of a batch is in a key and differs between ranks; rank 1 reports a rare value."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        task, rank = "ab"[(batch_idx + self.world.rank) % 2], self.world.rank
        rare = {"rare": 7} if rank == 1 and batch_idx == 4 else {}
        return result | {task: batch_idx + rank / 10} | rare


class CountingWorld(Callback[TinyTrainer]):
    """Counts the all-reduces of LoggerCallback in each step."""

    before: ClassVar = {LoggerCallback}

    def pre_fit(self) -> None:
        self.counts: list[int] = []
        all_reduce = self.trainer.world.all_reduce

        def counting(*args: Any, **kwargs: Any) -> Any:
            self.counts[-1] += 1
            return all_reduce(*args, **kwargs)

        self.trainer.world.all_reduce = counting  # type: ignore[method-assign]

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self.counts.append(0)


def train_tasks(directory):
    counting = CountingWorld()
    trainer = TaskTrainer(tiny_config(directory, [counting, LoggerCallback(1)]))
    trainer.fit()
    return trainer.run_dir, counting.counts


def test_keys_that_differ_by_rank_are_averaged_over_the_ranks_that_report_them(tmp_path):
    (run_dir, counts), _ = run_on_ranks(train_tasks, 2, tmp_path, timeout_s=60)

    rows = read_jsonl(run_dir)
    steps = list(range(1, 9))
    expected = [[(step - 1) + ((step - 1 + i) % 2) / 10 for step in steps] for i in (0, 1)]
    assert series(rows, "train/a") == (steps, pytest.approx(expected[0]))
    assert series(rows, "train/b") == (steps, pytest.approx(expected[1]))
    assert series(rows, "train/rare") == ([5], [7.0])
    assert len(series(rows, "train/loss")[0]) == 8
    assert counts[0] == 2, "of the log, and of the comparison of replicas after the first step"
    assert counts[1:4] == [1, 1, 1]  # the keys are exchanged once, then they are known
    assert counts[4] == 2  # a new key
    assert counts[5:7] == [1, 1]


class TokenTrainer(TinyTrainer):
    """A loss with a weight of its own, which differs between ranks and microbatches."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        value, weight = float(batch_idx), 1 + batch_idx % 2 + 2 * self.world.rank
        no_token = WeightedMean(float("nan"), torch.tensor(0))
        return result | {
            "numbers": WeightedMean(value + self.world.rank, weight),
            "tensors": WeightedMean(torch.tensor(value + self.world.rank), torch.tensor(weight)),
            "sometimes": WeightedMean(value, 1) if batch_idx < 2 else no_token,
            "rank0": WeightedMean(value, 1) if self.world.rank == 0 else no_token,
        }


def train_tokens(directory):
    config = tiny_config(directory, [LoggerCallback(1)], gradient_accumulation_steps=2)
    trainer = TokenTrainer(config)
    trainer.fit()
    return trainer.run_dir


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_weighted_mean_counts_with_its_weight_over_microbatches_and_ranks(tmp_path, num_ranks):
    run_dir, *_ = run_on_ranks(train_tokens, num_ranks, tmp_path, timeout_s=60)

    rows = read_jsonl(run_dir)
    expected = []
    for step in range(4):
        pairs = [
            (batch_idx + rank, 1 + batch_idx % 2 + 2 * rank)
            for batch_idx in (2 * step, 2 * step + 1)
            for rank in range(num_ranks)
        ]
        expected.append(sum(v * w for v, w in pairs) / sum(w for _, w in pairs))
    assert series(rows, "train/numbers") == ([1, 2, 3, 4], pytest.approx(expected))
    assert series(rows, "train/tensors") == ([1, 2, 3, 4], pytest.approx(expected))
    assert series(rows, "train/sometimes") == ([1], [0.5])
    assert series(rows, "train/rank0")[1] == [0.5, 2.5, 4.5, 6.5]


class NumpyTrainer(TinyTrainer):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        import numpy

        result = super().training_step(batch, batch_idx)
        value = batch_idx + self.world.rank
        kinds = {kind: getattr(numpy, kind)(value) for kind in ("float32", "float64", "int64")}
        return result | kinds | {"array": numpy.array([value]), "flag": numpy.bool_(value % 2)}

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        import numpy

        return {"val_rank": numpy.float32(self.world.rank), "val_array": numpy.ones((1, 1))}


def train_numpy(directory):
    trainer = NumpyTrainer(tiny_config(directory, [LoggerCallback(1)]))
    trainer.fit()
    return trainer.run_dir


def test_numbers_of_numpy_are_logged_as_any_other(tmp_path):
    pytest.importorskip("numpy")
    run_dir, _ = run_on_ranks(train_numpy, 2, tmp_path, timeout_s=60)

    rows = read_jsonl(run_dir)
    for key in ("float32", "float64", "int64", "array"):
        assert series(rows, f"train/{key}")[1] == [i + 0.5 for i in range(8)]
        assert series(rows, f"epoch/{key}") == ([8], [4.0])
    assert series(rows, "train/flag")[1] == [0.5] * 8
    assert series(rows, "val_rank") == ([8], [0.5])
    assert series(rows, "val_array") == ([8], [1.0])


class AlternatingTrainer(TinyTrainer):
    """Reports an extra value in every third batch, on all ranks."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        result = super().training_step(batch, batch_idx)
        return result | ({"rare": float(self.world.rank)} if batch_idx % 3 == 0 else {})


def train_alternating(directory):
    trainer = AlternatingTrainer(
        tiny_config(directory, [LoggerCallback(1, log_every_n_val_batches=1)])
    )
    trainer.fit()
    return trainer.run_dir


def test_values_that_all_ranks_report_in_some_steps_are_reduced(tmp_path):
    run_dir, _ = run_on_ranks(train_alternating, 2, tmp_path)

    rows = read_jsonl(run_dir)
    assert series(rows, "train/rare") == ([1, 4, 7], [0.5] * 3)
    assert len(series(rows, "train/loss")[0]) == 8
    assert len(series(rows, "val_batch/val_loss")[0]) == 2


def open_badly(directory):
    trainer = TinyTrainer(tiny_config(directory, [LoggerCallback(1, sinks=[FailingSink()])]))
    trainer.fit()


def test_a_log_that_cannot_be_opened_is_an_error_on_all_ranks(tmp_path):
    with pytest.raises(RankError) as caught:
        run_on_ranks(open_badly, 2, tmp_path, timeout_s=30)

    assert "PermissionError: not here" in caught.value.tracebacks[0]
    for text in caught.value.tracebacks.values():
        assert "the log couldn't be opened: rank 0: PermissionError: not here" in text


def test_a_non_finite_loss_is_logged_unchanged(tmp_path):
    class Infinite(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            super().training_step(batch, batch_idx)
            return {"loss": torch.tensor(math.inf), "nan": math.nan}

    trainer = Infinite(tiny_config(tmp_path, [LoggerCallback(1)], max_steps=1))
    trainer.fit()

    text = (trainer.run_dir / "log.jsonl").read_text()
    assert all(json.loads(line) for line in text.splitlines())
    assert series(read_jsonl(trainer.run_dir), "train/loss")[1] == [math.inf]
