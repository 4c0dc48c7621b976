"""ProgressBar where stdout is no terminal; test_terminal.py has the bar itself."""

import contextlib
import copy
import io
import logging
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dream_callbacks.summary import ProgressBar
from dream_trainer.callbacks import Callback, CallbackCollection, Every
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.trainer import BaseTrainer


def lines_of(trainer: TinyTrainer, call: Any = TinyTrainer.fit) -> list[str]:
    """Lines that a run prints, without times and speeds."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        call(trainer)
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # if the environment enables colors
    without_speed = re.sub(r"  [\d,.]+ (steps/s|s/step)", "", text)
    without_times = re.sub(r"  (\d+:)+\d\d( left)?", "", without_speed)
    return [re.sub(" +", " ", line).strip() for line in without_times.splitlines()]


def shape_of(line: str) -> str:
    """A line with its numbers of four digits replaced."""
    return re.sub(r"-?\d+\.\d+(e-\d+)?", "#", line)


class StopAfter(Callback[BaseTrainer]):
    def __init__(self, num_batches: int) -> None:
        self.num_batches = num_batches

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if self.trainer.local_batches == self.num_batches:
            self.trainer.stop("enough")


def test_a_file_has_one_line_per_epoch_and_one_per_validation(tmp_path: Path):
    lines = lines_of(TinyTrainer(tiny_config(tmp_path, [ProgressBar()], n_epochs=2)))

    assert [shape_of(line) for line in lines] == [
        "epoch 1/2 step 8 loss #",
        "epoch 1/2 step 8 val_loss #",
        "epoch 2/2 step 16 loss #",
        "epoch 2/2 step 16 val_loss #",
    ]


def loader(num_samples: int) -> Any:
    return torch.utils.data.DataLoader(torch.zeros(num_samples, 4), 2)  # type: ignore[arg-type]


class Several(TinyTrainer):
    def configure_dataloaders(self) -> Any:
        train, val = super().configure_dataloaders()
        return train, {"clean": val, "noisy": val}

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"size": float(len(batch))}


def test_evaluations_have_a_line_each(tmp_path: Path):
    trainer = Several(tiny_config(tmp_path, [ProgressBar()], n_epochs=1))
    trainer.fit()

    assert [shape_of(line) for line in lines_of(trainer, Several.validate)] == [
        "validation 4 batches clean/val_loss # noisy/val_loss # at step 8"
    ]
    assert lines_of(trainer, lambda t: t.test(loader(5))) == ["test 3 batches size 1.800 at step 8"]
    assert lines_of(trainer, lambda t: t.predict(loader(5))) == ["predict 3 batches"]
    assert lines_of(Several(tiny_config(tmp_path, [ProgressBar()])), Several.validate)


def test_a_line_shows_the_means_of_its_epoch(tmp_path: Path):
    class Means(Callback[BaseTrainer]):
        def post_train_epoch(self, result: dict[str, Any]) -> None:
            self.loss = result["loss"]

    means = Means()
    lines = lines_of(TinyTrainer(tiny_config(tmp_path, [ProgressBar(), means])))

    assert f"loss {means.loss:#.4g}" in lines[0]


def test_only_plain_text_is_written_to_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    TinyTrainer(tiny_config(tmp_path, [ProgressBar()])).fit()

    assert re.fullmatch(r"[\x20-\x7e\n]+", capfd.readouterr().out)


def test_force_color_does_not_draw_a_bar_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    TinyTrainer(tiny_config(tmp_path, [ProgressBar()])).fit()
    out = capfd.readouterr().out

    assert "\x1b[" in out  # colors, as requested
    assert not re.findall(r"\x1b\[[^m]*[A-Za-ln-z]", out)  # and no cursor movement
    assert len(out.splitlines()) == 2


def test_line_every_writes_lines_within_an_epoch(tmp_path: Path):
    class SlowTrainer(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            time.sleep(0.06)
            return super().training_step(batch, batch_idx)

    bar = ProgressBar(line_every=Every(seconds=0.1))
    lines = lines_of(SlowTrainer(tiny_config(tmp_path, [bar])))
    between = [line for line in lines if "/8 steps" in line]

    assert 1 <= len(between) <= 8
    assert all(re.fullmatch(r"epoch 1/1 [1-8]/8 steps loss [\d.]+", line) for line in between)


def test_validations_between_steps_have_their_own_line(tmp_path: Path):
    config = tiny_config(tmp_path, [ProgressBar()], val_every_n_steps=3)

    assert [shape_of(line) for line in lines_of(TinyTrainer(config))] == [
        "epoch 1/1 step 3 val_loss #",
        "epoch 1/1 step 6 val_loss #",
        "epoch 1/1 step 8 loss #",
    ]


def test_the_sanity_validation_has_no_line(tmp_path: Path):
    config = tiny_config(tmp_path, [ProgressBar()], num_sanity_val_steps=1, max_steps=3)

    assert [shape_of(line) for line in lines_of(TinyTrainer(config))] == [
        "epoch 1 step 3/3 val_loss #",
        "epoch 1 3/3 steps loss #",
    ]


def test_validation_values_are_marked(tmp_path: Path):
    class SameNames(TinyTrainer):
        def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": super().validation_step(batch, batch_idx)["val_loss"], "n": 3}

    lines = lines_of(SameNames(tiny_config(tmp_path, [ProgressBar()])))

    assert shape_of(lines[1]) == "epoch 1/1 step 8 val loss # val n #"


def test_a_continued_run_starts_where_it_stopped(tmp_path: Path):
    trainer = TinyTrainer(tiny_config(tmp_path, [ProgressBar(), StopAfter(3)]))

    assert [shape_of(line) for line in lines_of(trainer)] == [
        "epoch 1/1 3/8 steps loss #",
        "stopped at step 3: enough",
    ]
    assert [shape_of(line) for line in lines_of(trainer)] == [
        "epoch 1/1 step 8 loss #",
        "epoch 1/1 step 8 val_loss #",
    ]


def test_fitting_a_finished_run_again_prints_nothing(tmp_path: Path):
    trainer = TinyTrainer(tiny_config(tmp_path, [ProgressBar()]))
    lines_of(trainer)

    assert lines_of(trainer) == []


def test_a_loaded_state_continues_the_progress(tmp_path: Path):
    first = TinyTrainer(tiny_config(tmp_path, [StopAfter(3)], gradient_accumulation_steps=2))
    first.fit()
    second = TinyTrainer(
        tiny_config(tmp_path, [ProgressBar(), StopAfter(7)], gradient_accumulation_steps=2)
    )
    second.setup()
    second.load_state_dict(first.state_dict())

    assert lines_of(second)[-2].startswith("epoch 1/1 4/4 steps")


def test_any_key_of_the_result_can_be_shown(tmp_path: Path):
    class TwoNumbers(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {**super().training_step(batch, batch_idx), "twice": 2 * (batch_idx + 1)}

    bar = ProgressBar(metric="twice")

    assert lines_of(TwoNumbers(tiny_config(tmp_path, [bar], max_steps=5)))[-1].endswith("twice 10")


def test_a_missing_metric_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    bar = ProgressBar(metric="los")
    config = tiny_config(tmp_path, [bar], gradient_accumulation_steps=2, n_epochs=2)
    lines_of(TinyTrainer(config))

    (record,) = caplog.records
    assert record.getMessage() == (
        "ProgressBar(metric='los'): training_step returned loss; choose one of these keys, or "
        "leave metric out"
    )


def test_a_metric_of_only_the_last_microbatch_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Norm(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            result = super().training_step(batch, batch_idx)
            return result if self.is_accumulating_gradients else {**result, "norm": 7}

    config = tiny_config(
        tmp_path, [ProgressBar(metric="norm")], gradient_accumulation_steps=2, max_steps=3
    )

    assert lines_of(Norm(config))[-1].endswith("norm 7")
    assert caplog.records == []


def test_loaders_without_length_show_only_the_count(tmp_path: Path):
    class Endless:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield torch.randn(4, 4), torch.randn(4, 1)

    class Few(Endless):
        def __iter__(self) -> Iterator[Any]:
            for _, batch in zip(range(3), super().__iter__(), strict=False):
                time.sleep(0.15)
                yield batch

    class LengthlessTrainer(TinyTrainer):
        def configure_dataloaders(self) -> Any:
            return Endless(), Few()

    bar = ProgressBar(line_every=Every(seconds=0.1))
    lines = lines_of(LengthlessTrainer(tiny_config(tmp_path, [bar], train_steps_per_epoch=5)))

    assert any(re.fullmatch(r"epoch 1/1 validation [23] batches", line) for line in lines)
    assert any(line.startswith("epoch 1/1 step 5 loss") for line in lines)


def test_max_time_alone_gives_the_remaining_time(tmp_path: Path):
    class Slow(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            time.sleep(0.06)
            return super().training_step(batch, batch_idx)

    out = io.StringIO()
    bar = ProgressBar(line_every=Every(seconds=0.1))
    with contextlib.redirect_stdout(out):
        Slow(tiny_config(tmp_path, [bar], max_time=0.9)).fit()

    assert "0:00 left" in out.getvalue()
    assert "stopped at step" in out.getvalue()


@pytest.mark.parametrize("error", [ValueError("bad\nbatch"), KeyboardInterrupt()], ids=repr)
def test_an_error_is_the_last_line(tmp_path: Path, error: BaseException):
    class Failing(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            if batch_idx == 2:
                raise error
            return super().training_step(batch, batch_idx)

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(type(error)):
        Failing(tiny_config(tmp_path, [ProgressBar()])).fit()
    expected = {
        ValueError: "failed at step 2: ValueError: bad",
        KeyboardInterrupt: "interrupted at step 2",
    }

    assert out.getvalue().splitlines()[-1] == expected[type(error)]


def test_a_bar_added_during_the_run_works(tmp_path: Path):
    class Adder(Callback[BaseTrainer]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            if batch_idx == 4:
                self.trainer.callbacks.append(ProgressBar())

    lines = lines_of(TinyTrainer(tiny_config(tmp_path, [Adder()])))

    assert [shape_of(line) for line in lines] == [
        "epoch 1/1 step 8 loss #",
        "epoch 1/1 step 8 val_loss #",
    ]


def test_an_error_before_fit_prints_nothing(tmp_path: Path):
    class Failing(TinyTrainer):
        def configure_optimizers(self) -> None:
            raise ValueError("no")

    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(ValueError, match="no"):
        Failing(tiny_config(tmp_path, [ProgressBar()])).fit()

    assert out.getvalue() == ""


def test_copies_and_pickles_made_during_a_run_are_independent(tmp_path: Path):
    class Copier(Callback[BaseTrainer]):
        def post_train_epoch(self, result: dict[str, Any]) -> None:
            bar = self.trainer.callbacks["ProgressBar"]
            self.copies = [copy.deepcopy(bar), pickle.loads(pickle.dumps(bar))]

    copier = Copier()
    lines_of(TinyTrainer(tiny_config(tmp_path, [ProgressBar(metric="loss"), copier])))

    for bar in copier.copies:
        assert len(lines_of(TinyTrainer(tiny_config(tmp_path, [bar])))) == 2


def test_callbacks_deep_copied_before_the_run_work(tmp_path: Path):
    callbacks = copy.deepcopy(CallbackCollection([ProgressBar()]))

    assert len(lines_of(TinyTrainer(tiny_config(tmp_path, callbacks)))) == 2


def test_the_bar_needs_no_collectives(tmp_path: Path):
    config = tiny_config(tmp_path, [ProgressBar()], n_epochs=2)
    config.debug = True  # a collective in a rank-zero hook is an error then

    assert len(lines_of(TinyTrainer(config))) == 4


def text_of_rank(root_dir: str) -> str:
    return "\n".join(lines_of(TinyTrainer(tiny_config(root_dir, [ProgressBar()]))))


def test_on_two_ranks_only_the_first_prints(tmp_path: Path):
    first, second = run_on_ranks(text_of_rank, 2, str(tmp_path))

    assert first.startswith("epoch 1/1 step 8 loss")
    assert second == ""


class CountReadings(TorchDispatchMode):
    """Counts how often a tensor's value is read by Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() == "aten::_local_scalar_dense"
        return func(*args, **kwargs or {})


class SGDTrainer(TinyTrainer):
    """Reads nothing on the host, while AdamW reads its step counts."""

    def configure_optimizers(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)


def readings_in(tmp_path: Path, callbacks: list[Callback[Any]]) -> tuple[int, float]:
    config = tiny_config(tmp_path, callbacks)
    config.num_samples = 4000
    trainer = SGDTrainer(config)
    trainer.setup()
    start_s = time.monotonic()
    with CountReadings() as mode:
        lines_of(trainer)
    return mode.count, time.monotonic() - start_s


def test_the_host_reads_a_few_values_per_second_not_one_per_step(tmp_path: Path):
    without, _ = readings_in(tmp_path, [])
    with_bar, seconds = readings_in(tmp_path, [ProgressBar()])

    # Five per second, plus the first step, around the validation and the end.
    assert 1 <= with_bar - without <= seconds * 5 + 5


def test_large_results_of_a_step_are_not_kept(tmp_path: Path):
    class Logits(TinyTrainer):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            logits = torch.zeros(1000)
            alive.append(logits)
            return {"logits": logits, **super().training_step(batch, batch_idx)}

    class Observer(Callback[BaseTrainer]):
        after = {ProgressBar}

        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            kept = vars(self.trainer.callbacks["ProgressBar"]).values()
            alive_in_bar.append(any(value is alive[-1] for value in kept))

    alive: list[torch.Tensor] = []
    alive_in_bar: list[bool] = []
    lines_of(Logits(tiny_config(tmp_path, [ProgressBar(), Observer()])))

    assert alive_in_bar == [False] * 8


@pytest.mark.parametrize("smoothing", [-0.1, 1.1, float("nan")])
def test_a_smoothing_out_of_range_is_rejected(smoothing: float):
    with pytest.raises(ValueError, match=r"from 0 .* to 1 .* is required"):
        ProgressBar(smoothing=smoothing)


def test_arguments_of_the_contract_can_be_positional():
    bar = ProgressBar(0.5, "accuracy")

    assert (bar.smoothing, bar.metric) == (0.5, "accuracy")


def test_a_closed_pipe_disables_the_bar_but_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

        def fileno(self) -> int:
            return sink.fileno()

    trainer = TinyTrainer(tiny_config(tmp_path, [ProgressBar()], n_epochs=2))
    with open(tmp_path / "sink", "w") as sink, contextlib.redirect_stdout(Closed()):
        trainer.fit()

    assert trainer.current_epoch == 1
    assert [r.levelno for r in caplog.records if r.name.startswith("dream_callbacks")] == [
        logging.WARNING
    ]
