"""Signals stop a run or request a save, and have their default effect after clean-up."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dream_trainer.callbacks import Callback
from dream_trainer.testing import RankError, TinyTrainer, run_on_ranks, tiny_config


class EndsAChild(Callback[TinyTrainer]):
    """Forks a process and sends it SIGTERM, as data loaders do at their end."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 2:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
            child.start()
            time.sleep(0.2)
            child.terminate()
            child.join(timeout=10)
            assert child.exitcode == -signal.SIGTERM
            time.sleep(0.5)  # time for a watch to mistake it for its own


def ends_a_child(root: str) -> tuple[int, bool]:
    trainer = TinyTrainer(tiny_config(root, [EndsAChild()], n_epochs=1))
    trainer.fit()
    return trainer.global_step, signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_signal_to_a_child_does_not_stop_its_parent(tmp_path: Path) -> None:
    assert run_on_ranks(ends_a_child, 2, str(tmp_path)) == [(8, True), (8, True)]


class Hangs(Callback[TinyTrainer]):
    """Before training, rank 0 waits in a barrier that the others never reach; all get SIGTERM."""

    def post_setup(self) -> None:
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        if self.trainer.world.rank == 0:
            dist.barrier()
        time.sleep(60)


def hangs(root: str) -> None:
    TinyTrainer(tiny_config(root, [Hangs()], n_epochs=1)).fit()


def test_sigterm_ends_a_hanging_collective_silently(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    started_s = time.monotonic()

    with pytest.raises(RankError) as caught:
        run_on_ranks(hangs, 2, str(tmp_path))

    assert time.monotonic() - started_s < 10
    assert sorted(caught.value.tracebacks) == [0, 1]
    for text in caught.value.tracebacks.values():
        assert f"exit code {-signal.SIGTERM}" in text
    assert "RemoteError" not in capfd.readouterr().err


class HandlesSigterm(Callback[TinyTrainer]):
    """Handles SIGTERM during `fit`, and restores the handler."""

    def pre_fit(self) -> None:
        self.num_signals = 0
        self.before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.num_signals += 1

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    def post_fit(self) -> None:
        signal.signal(signal.SIGTERM, self.before)


def handles_sigterm(root: str) -> tuple[int, int]:
    callback = HandlesSigterm()
    trainer = TinyTrainer(tiny_config(root, [callback], n_epochs=1))
    trainer.fit()
    return trainer.global_step, callback.num_signals


def test_a_handler_set_by_a_callback_gets_the_signal(tmp_path: Path) -> None:
    assert run_on_ranks(handles_sigterm, 2, str(tmp_path)) == [(8, 1), (8, 1)]


class Sends(Callback[Any]):
    """Sends this process, or its group, signals in one hook of one rank."""

    def __init__(
        self, *numbers: int, hook: str = "post_train_step", rank: int = 0, at_step: int = 3
    ) -> None:
        self.numbers = numbers
        self.hook = hook
        self.rank = rank
        self.at_step = at_step

    def _send(self, hook: str) -> None:
        trainer = self.trainer
        if (hook, trainer.world.rank, trainer.global_step) == (self.hook, self.rank, self.at_step):
            self.at_step = -1
            for number in self.numbers:
                signal.raise_signal(number)

    def pre_fit(self) -> None:
        self._send("pre_fit")

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._send("post_train_step")

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        self._send("post_validation_step")


class Notes(Callback[Any]):
    """Appends the hooks called at the end, with the stop reason, to a file."""

    def __init__(self, file: Path, name: str) -> None:
        self.file = file
        self.name = name

    def _note(self, hook: str) -> None:
        trainer = self.trainer
        with self.file.open("a") as file:
            file.write(f"{self.name}.{hook} {trainer.stop_reason} {trainer.exception!r}\n")

    def on_exception(self, exception: BaseException) -> None:
        self._note("on_exception")

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._note("post_validation_epoch")

    def post_fit(self) -> None:
        self._note("post_fit")


def status_of(function: Callable[..., object], *args: Any) -> int:
    """Exit status of a forked process that makes a call as a script does."""
    process = os.fork()
    if process == 0:
        try:
            function(*args)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def train(root: Path, *callbacks: Callback[Any], **training: Any) -> TinyTrainer:
    trainer = TinyTrainer(tiny_config(root, callbacks, **training))
    trainer.fit()
    return trainer


def notes_of(root: Path, sends: Sends, **training: Any) -> tuple[int, list[str]]:
    """Exit status, and the records of two callbacks, before and after the sender."""
    file = root / "notes"
    callbacks = [Notes(file, "first"), sends, Notes(file, "last")]
    status = status_of(partial(train, root, *callbacks, **training))
    return status, file.read_text().splitlines()


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_process_after_every_callback_has_cleaned_up(
    tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    ((status, notes),) = run_on_ranks(notes_of, 1, tmp_path, Sends(number))

    assert status == expected
    # The run was stopped and hasn't failed, so on_exception isn't called.
    assert notes == [f"{name}.post_fit {number.name} None" for name in ("first", "last")]


@pytest.mark.parametrize("hook", ["pre_fit", "post_validation_step"])
def test_a_signal_before_and_in_the_sanity_validation_stops_before_the_first_step(
    tmp_path: Path, hook: str
) -> None:
    sends = Sends(signal.SIGTERM, hook=hook, at_step=0)

    ((status, notes),) = run_on_ranks(partial(notes_of, num_sanity_val_steps=2), 1, tmp_path, sends)

    assert status == -signal.SIGTERM
    assert notes == [f"{name}.post_fit SIGTERM None" for name in ("first", "last")]


class StopsInValidation(TinyTrainer):
    """Gets SIGTERM in the first of two validation batches, or asks to stop there."""

    def configure_dataloaders(self) -> Any:
        train, _ = super().configure_dataloaders()
        self.evaluated: list[int] = []
        batches = [next(iter(train))] * 2
        return train, batches

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        self.evaluated.append(self.global_step)
        if self.global_step == 8 and batch_idx == 0:
            self.stop("seen enough")
        return super().validation_step(batch, batch_idx)


class InterruptsABatch(Callback[Any]):
    """Ctrl-C in the second of the three batches of the second step."""

    def pre_train_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            signal.raise_signal(signal.SIGINT)


def test_a_signal_between_the_batches_of_a_step_lets_the_step_be_completed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, [InterruptsABatch()], gradient_accumulation_steps=3)
    trainer = TinyTrainer(config)

    with pytest.raises(KeyboardInterrupt):
        trainer.fit()

    assert (trainer.global_step, trainer.local_batches) == (2, 6)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("every", [None, 4])
def test_a_stop_in_a_validation_takes_effect_after_its_batch(
    tmp_path: Path, every: int | None
) -> None:
    notes = Notes(tmp_path / "notes", "callback")
    config = tiny_config(tmp_path, [notes], n_epochs=2, val_every_n_steps=every)
    trainer = StopsInValidation(config)

    trainer.fit()

    assert trainer.evaluated[-3:] == ([4, 4, 8] if every else [8])
    assert (trainer.global_step, trainer.counters.validated_step) == (8, 4 if every else -1)
    seen = notes.file.read_text().splitlines()
    assert [line.split()[0] for line in seen] == [
        *(["callback.post_validation_epoch"] if every else []),
        "callback.post_fit",
    ]


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path: Path) -> None:
    ((status, notes),) = run_on_ranks(notes_of, 1, tmp_path, Sends(signal.SIGINT, signal.SIGINT))

    assert status == 130
    assert [line.split()[0] for line in notes] == [
        "first.on_exception",
        "last.on_exception",
        "first.post_fit",
        "last.post_fit",
    ]
    assert all("KeyboardInterrupt" in line for line in notes)


def handler_of_a_user(root: Path) -> tuple[list[int], list[int], bool]:
    """Steps done when the handler was called, and the handler after the run."""
    trainer = TinyTrainer(tiny_config(root, [Sends(signal.SIGTERM)]))
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(trainer.counters.local_batches)

    signal.signal(signal.SIGTERM, handler)
    trainer.fit()
    return seen, [trainer.global_step], signal.getsignal(signal.SIGTERM) is handler


def test_a_users_handler_is_called_once_after_the_run(tmp_path: Path) -> None:
    assert run_on_ranks(handler_of_a_user, 1, tmp_path) == [([3], [3], True)]


def ignores(root: Path) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return train(root, Sends(signal.SIGTERM)).global_step


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    assert run_on_ranks(ignores, 1, tmp_path) == [8]


def test_a_save_request_without_a_listener_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = train(tmp_path, Sends(signal.SIGUSR1))

    assert trainer.global_step == 8
    assert caplog.messages == [
        "SIGUSR1 asks for a save, and no callback saves: add a CheckpointCallback"
    ]


class TrainsAnother(Callback[Any]):
    """Trains another trainer, which gets a signal."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pre_epoch(self) -> None:
        self.inner = train(self.root / "inner", Sends(signal.SIGTERM))
        self.goes_on = True


def trains_in_a_callback(root: Path) -> tuple[int, int, bool, int]:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    outer = TrainsAnother(root)
    trainer = train(root, outer)
    return outer.inner.global_step, trainer.global_step, outer.goes_on, len(seen)


def test_a_signal_stops_the_runs_that_it_finds_and_takes_effect_after_the_outermost(
    tmp_path: Path,
) -> None:
    # The outer run has done one step; the inner one was stopped before its first.
    assert run_on_ranks(trains_in_a_callback, 1, tmp_path) == [(3, 1, True, 1)]


def fails_after_a_signal(root: Path) -> list[str]:
    """A run that got a signal fails; the signal must not affect the next run."""

    class Fails(Callback[Any]):
        def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
            signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    seen = []
    try:
        train(root / "failed", Fails())
    except ZeroDivisionError:
        seen.append("failed")
    train(root / "next")
    return [*seen, str(signal.getsignal(signal.SIGINT) is signal.default_int_handler)]


def test_a_signal_of_a_run_that_failed_is_not_delivered_by_the_next(tmp_path: Path) -> None:
    assert run_on_ranks(fails_after_a_signal, 1, tmp_path) == [["failed", "True"]]


def in_a_thread(root: Path) -> int:
    trainers: list[TinyTrainer] = []
    thread = threading.Thread(target=lambda: trainers.append(train(root)))
    thread.start()
    thread.join()
    return trainers[0].global_step


def test_outside_of_the_main_thread_no_handler_is_set(tmp_path: Path) -> None:
    assert run_on_ranks(in_a_thread, 1, tmp_path) == [8]


def interrupted_on_one_rank(root: Path) -> tuple[str, int, str | None]:
    class Slow(Callback[Any]):
        def post_fit(self) -> None:
            if self.trainer.world.rank == 0:
                time.sleep(1.0)

    trainer = TinyTrainer(tiny_config(root, [Sends(signal.SIGINT, rank=1), Slow()], n_epochs=1))
    try:
        trainer.fit()
    except KeyboardInterrupt:
        return "interrupted", trainer.global_step, trainer.stop_reason
    return "ended", trainer.global_step, trainer.stop_reason


def test_ctrl_c_on_one_rank_stops_all_without_a_failure(tmp_path: Path) -> None:
    first, second = run_on_ranks(interrupted_on_one_rank, 2, tmp_path)

    assert [first[0], second[0]] == ["ended", "interrupted"]
    assert first[1:] == second[1:]
    assert first[2] == "SIGINT"


class StopsInSetup(Callback[Any]):
    def post_setup(self) -> None:
        if self.trainer.world.rank == 0:
            self.trainer.stop("nothing to do")


def stopped_in_setup(root: Path) -> list[tuple[int, str | None]]:
    """Steps and stop reason after a first `fit`, and after a second one."""
    trainer = TinyTrainer(tiny_config(root, [StopsInSetup()]))
    trainer.setup()
    seen = []
    for _ in range(2):
        trainer.fit()
        seen.append((trainer.global_step, trainer.stop_reason))
    return seen


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stop_in_set_up_counts_for_the_first_fit(tmp_path: Path, num_ranks: int) -> None:
    found = run_on_ranks(stopped_in_setup, num_ranks, tmp_path)

    assert found == [[(0, "nothing to do"), (8, None)]] * num_ranks


class WaitsForRank1(Callback[Any]):
    """Rank 0 gets SIGTERM while it waits for rank 1 to begin the run."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pre_launch(self) -> None:
        if os.environ["RANK"] == "0":
            threading.Thread(target=self._signal_when_asked, daemon=True).start()

    def _signal_when_asked(self) -> None:
        while not self.file.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def post_setup(self) -> None:
        if self.trainer.world.rank == 1:
            time.sleep(1.0)  # rank 0 is in `requests.start()` by now
            self.file.touch()
            time.sleep(1.0)


def signalled_at_the_start(root: Path) -> tuple[int, str | None]:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    trainer = train(root, WaitsForRank1(root / "signal"))
    return trainer.global_step, trainer.stop_reason


def test_a_signal_while_ranks_wait_for_each_other_to_start_is_not_lost(tmp_path: Path) -> None:
    assert run_on_ranks(signalled_at_the_start, 2, tmp_path) == [(0, "SIGTERM")] * 2


class SignalsThenTrains(Callback[Any]):
    """Gets a signal, and trains another trainer afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def pre_epoch(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.inner = train(self.root / "inner")


def trains_after_a_signal(root: Path) -> tuple[int, str | None]:
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    outer = SignalsThenTrains(root)
    train(root, outer)
    return outer.inner.global_step, outer.inner.stop_reason


def test_a_run_started_after_the_signal_is_stopped(tmp_path: Path) -> None:
    assert run_on_ranks(trains_after_a_signal, 1, tmp_path) == [(0, "SIGTERM")]


class SignalsInPostFit(Callback[Any]):
    def post_fit(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.reason = self.trainer.stop_reason


def signalled_after_its_end(root: Path) -> tuple[int, str | None, int]:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    callback = SignalsInPostFit()
    trainer = train(root, callback)
    return trainer.global_step, callback.reason, len(seen)


def test_a_signal_after_the_last_step_is_not_a_stop_reason(tmp_path: Path) -> None:
    assert run_on_ranks(signalled_after_its_end, 1, tmp_path) == [(8, None, 1)]


class ChainsSIGINT(Callback[Any]):
    """As some libraries do: installs a handler during the run and restores the one it found."""

    def pre_fit(self) -> None:
        self.before = signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted_after_the_run(root: Path) -> str:
    callback = ChainsSIGINT()
    train(root, callback)
    signal.signal(signal.SIGINT, callback.before)
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return "interrupted"
    return "not interrupted"


def test_a_handler_of_ours_that_is_restored_after_the_run_calls_the_one_before_it(
    tmp_path: Path,
) -> None:
    assert run_on_ranks(interrupted_after_the_run, 1, tmp_path) == ["interrupted"]
