"""SIGTERM, SIGINT and SIGUSR1: all ranks save between two steps, then the signal is raised."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from forked_runs import forked, free_port, resumed_step, wait_for
from tiny_runs import Average, SendSignal, saved, steps, tiny
from training import Everything, Filled, History, different, make, weights

from dream_trainer.callbacks import Callback, Every
from dream_trainer.testing import run_on_ranks


def run_and_die(root: Path, number: int) -> int:
    """Exit status of a process whose run gets a signal."""
    process = os.fork()
    if process == 0:
        tiny(root, SendSignal(number), every=Every(steps=100)).fit()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_sigterm_saves_and_then_ends_the_process(tmp_path: Path) -> None:
    (status,) = run_on_ranks(run_and_die, 1, tmp_path, int(signal.SIGTERM))

    assert status == -signal.SIGTERM
    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(3, "SIGTERM")]


def test_the_same_command_resumes_the_run(tmp_path: Path) -> None:
    run_on_ranks(run_and_die, 1, tmp_path, int(signal.SIGTERM))

    tiny(tmp_path, every=Every(steps=100)).fit()

    assert steps(tmp_path) == [3, 16]


def test_ctrl_c_saves_and_then_interrupts(tmp_path: Path) -> None:
    closed = []

    class Closes(Callback[Any]):
        def post_fit(self) -> None:
            closed.append(self.trainer.stop_reason)

    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, SendSignal(signal.SIGINT), Closes(), every=Every(steps=100)).fit()

    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(3, "SIGINT")]
    assert closed == ["SIGINT"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    class TwiceInOneStep(SendSignal):
        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            super().pre_train_step(batch, batch_idx)
            super().pre_train_step(batch, batch_idx)

    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, TwiceInOneStep(signal.SIGINT), every=Every(steps=100)).fit()

    assert steps(tmp_path) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigusr1_saves_and_training_continues(tmp_path: Path) -> None:
    tiny(tmp_path, SendSignal(signal.SIGUSR1), every=Every(steps=100)).fit()

    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(3, "SIGUSR1"), (16, "end")]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_earlier_handlers_get_the_signal_after_the_run(tmp_path: Path) -> None:
    seen: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        seen.append(len(steps(tmp_path)))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        tiny(tmp_path, SendSignal(signal.SIGTERM), every=Every(steps=100)).fit()
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)

    assert seen == [1], "once, with the checkpoint there"


def test_save_on_signal_false_does_not_save(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tiny(tmp_path, SendSignal(signal.SIGINT), save_on_signal=False).fit()

    assert steps(tmp_path) == []


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, layout: str) -> None:
    results = run_on_ranks(signalled, 2, tmp_path, int(signal.SIGTERM), layout)

    (first_step, _), (second_step, _) = results
    assert first_step == second_step
    assert 3 <= first_step < 64
    assert [count for _, count in results] == [0, 1], "delivered to whom it was sent"
    assert [(c.step, c.manifest.reason) for c in saved(tmp_path)] == [(first_step, "SIGTERM")]


def test_sigusr1_to_one_rank_saves_on_all(tmp_path: Path) -> None:
    results = run_on_ranks(signalled, 2, tmp_path, int(signal.SIGUSR1), "fsdp")

    assert [step for step, _ in results] == [64, 64]
    first, last = saved(tmp_path)
    assert first.manifest.reason == "SIGUSR1"
    assert 3 <= first.step < 64
    assert last.step == 64


def signalled(root: Path, number: int, layout: str) -> tuple[int, int]:
    """Steps done, and how often the user's handler was called."""
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    trainer = tiny(
        root, SendSignal(number, rank=1), layout=layout, every=Every(steps=100), n_epochs=8
    )
    trainer.fit()
    return trainer.global_step, len(seen)


@pytest.mark.parametrize(
    "num_signals",
    [4, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(1200)])],
)
def test_a_signal_at_any_time_leaves_a_checkpoint_of_all_ranks(
    tmp_path: Path, num_signals: int
) -> None:
    (found,) = run_on_ranks(
        signal_repeatedly, 1, tmp_path, num_signals, timeout_s=100 + 5 * num_signals
    )

    assert found == sorted(set(found)), "each run resumed from the last"
    assert set(found) <= set(steps(tmp_path))
    reasons = {checkpoint.manifest.reason for checkpoint in saved(tmp_path)}
    assert reasons == {"SIGTERM", "SIGINT", "SIGUSR1"}


def signal_repeatedly(root: Path, num_signals: int) -> list[int]:
    """Body of a process that forks runs on two ranks and signals them; returns the saved steps."""
    draw = random.Random(num_signals)
    found = []
    for turn in range(num_signals):
        port = free_port()
        ranks = [
            forked(train_until_signalled, root, turn, rank=rank, num_ranks=2, port=port)
            for rank in (0, 1)
        ]
        wait_until(lambda turn=turn: len(list(root.glob(f"training-{turn}-*"))) == 2)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.3))
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[turn % 3]
        told = draw.choice([ranks, ranks[:1], ranks[1:]])
        for process in told:
            os.kill(process, number)
        if number == signal.SIGUSR1:
            wait_until(lambda: saved(root)[-1].manifest.reason == "SIGUSR1")
            number, told = signal.SIGTERM, ranks
            for process in told:
                os.kill(process, number)
        statuses = [wait_for(process, within_s=25.0) for process in ranks]
        ended = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: 130}[number]
        assert statuses == [ended if process in told else 0 for process in ranks]
        found.append(resumed_step(root, keep_last=None))
    return found


def train_until_signalled(root: Path, turn: int) -> None:
    """Body of a rank: saves only on request; its process exits as a script does."""

    class Mark(Callback[Any]):
        def pre_train_step(self, batch: Any, batch_idx: int) -> None:
            (root / f"training-{turn}-{self.trainer.world.rank}").touch()

    fields: dict[str, Any] = {"kind": Filled, "layout": "fsdp", "n_epochs": 1_000_000}
    try:
        tiny(root, Mark(), every=Every(steps=10**9), **fields).fit()
    except KeyboardInterrupt:
        os._exit(130)
    os._exit(0)


def wait_until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class InterruptsAValidation(Callback[Any]):
    """Ctrl-C in the first batch of a validation, on rank 0."""

    def __init__(self, step: int) -> None:
        self.step = step

    def post_validation_step(self, result: dict[str, Any], batch_idx: int) -> None:
        trainer = self.trainer
        if trainer.world.is_distributed:
            time.sleep(0.1)  # the other rank is told within a second, which is ten batches
        if (trainer.global_step, batch_idx, trainer.world.rank) == (self.step, 0, 0):
            signal.raise_signal(signal.SIGINT)


class ValidatesAnAverage(Average):
    """Exchanges the weights for their average around a validation, as the docs' MovingAverage."""

    is_exchanged = False

    def pre_validation_epoch(self) -> None:
        self._exchange()

    def post_validation_epoch(self, result: dict[str, Any]) -> None:
        self._exchange()

    def post_fit(self) -> None:
        if self.is_exchanged:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        self.is_exchanged = not self.is_exchanged
        for name, parameter in self.trainer.model.named_parameters():
            kept = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)


class ManyValidationBatches(Everything):
    """Long enough that two ranks know of the stop before the validation ends."""

    def configure_dataloaders(self) -> Any:
        return self._augmented(24, shuffle=True), self._augmented(80, shuffle=False)


def interrupted_and_resumed(
    root: Path, training: dict[str, Any], layout: str, num_workers: int
) -> Any:
    """Results of an uninterrupted run, and of one stopped in a validation and resumed."""
    found = []
    for name, interrupted in (("straight", [False]), ("resumed", [True, False])):
        history, evaluated = History(), 0
        for is_interrupted in interrupted:
            callbacks = [InterruptsAValidation(6)] if is_interrupted else []
            trainer = make(
                root / name,
                history,
                *callbacks,
                ValidatesAnAverage(),
                kind=ManyValidationBatches,
                layout=layout,
                keep_last=None,
                training={"n_epochs": 3, **training},
            )
            trainer.num_workers = num_workers
            try:
                trainer.fit()
            except KeyboardInterrupt:
                assert is_interrupted
            if is_interrupted:
                evaluated = trainer.counters.validated_step
        found.append((history.batches, history.epochs, history.validations, weights(trainer)))
    return found, trainer.global_step, evaluated


@pytest.mark.parametrize(
    ("layout", "num_workers", "training"),
    [
        ("single", 0, {}),
        ("single", 2, {"gradient_accumulation_steps": 2, "n_epochs": 5}),
        ("single", 0, {"val_every_n_steps": 3}),
        ("fsdp", 0, {"val_every_n_steps": 3}),
    ],
    ids=["epochs", "accumulating", "steps", "ranks"],
)
def test_stopped_in_a_validation_and_resumed_equals_never_stopped(
    tmp_path: Path, layout: str, num_workers: int, training: dict[str, Any]
) -> None:
    num_ranks = 2 if layout == "fsdp" else 1

    for found, last_step, validated_step in run_on_ranks(
        interrupted_and_resumed, num_ranks, tmp_path, training, layout, num_workers
    ):
        straight, resumed = found
        assert validated_step < 6, "it was left before its end"
        assert last_step > 6
        assert resumed[:3] == straight[:3]
        assert len(straight[2]) > 2
        assert different(resumed[3], straight[3]) == []
