"""SIGTERM while ranks are watched: it ends a process as ever, and no other one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
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


def test_what_a_child_gets_is_not_its_parents(tmp_path: Path) -> None:
    assert run_on_ranks(ends_a_child, 2, str(tmp_path)) == [(8, True), (8, True)]


class Hangs(Callback[TinyTrainer]):
    """Rank 0 waits for the others, which never come; all get SIGTERM then."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 2:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
            if self.trainer.world.rank == 0:
                dist.barrier()
            time.sleep(60)


def hangs(root: str) -> None:
    TinyTrainer(tiny_config(root, [Hangs()], n_epochs=1)).fit()


def test_a_collective_that_hangs_is_ended_without_a_word(
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


class TakesItself(Callback[TinyTrainer]):
    """Handles SIGTERM for a while, and gives it back."""

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


def takes_it_itself(root: str) -> tuple[int, int]:
    callback = TakesItself()
    trainer = TinyTrainer(tiny_config(root, [callback], n_epochs=1))
    trainer.fit()
    return trainer.global_step, callback.num_signals


def test_who_handles_it_meanwhile_decides(tmp_path: Path) -> None:
    assert run_on_ranks(takes_it_itself, 2, str(tmp_path)) == [(8, 1), (8, 1)]


class LetsThrough(Callback[TinyTrainer]):
    """Stops the run as Ctrl-C on rank 1 does, and lets that through while rank 0 closes."""

    def post_train_step(self, result: dict[str, Any], batch_idx: int) -> None:
        if batch_idx == 2:
            self.trainer.stop("SIGINT")

    def post_fit(self) -> None:
        if self.trainer.exception is None and self.trainer.world.rank == 1:
            raise KeyboardInterrupt
        time.sleep(1.0)


def interrupted_at_its_end(root: str) -> str:
    try:
        TinyTrainer(tiny_config(root, [LetsThrough()], n_epochs=1)).fit()
    except KeyboardInterrupt:
        return "interrupted"
    return "ended"


def test_an_interrupt_that_was_let_through_is_no_failure_for_others(tmp_path: Path) -> None:
    found = run_on_ranks(interrupted_at_its_end, 2, str(tmp_path))

    assert found == ["ended", "interrupted"]
