"""The device of a rank: in which threads it is set."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import Coordination, World


class NotesThreads(World):
    """Notes the threads in which the device was set."""

    def __init__(self, parameters: DeviceParameters) -> None:
        super().__init__(parameters)
        self.threads: list[str] = []

    def use_device(self) -> None:
        self.threads.append(threading.current_thread().name)
        super().use_device()


def test_a_rank_with_a_gpu_sets_it_in_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    world = World(DeviceParameters(device="cpu"))

    world.use_device()
    assert calls == []
    world.device = torch.device("cuda", 3)
    world.use_device()
    assert calls == [torch.device("cuda", 3)]


def test_configure_setup_and_fit_may_run_in_different_threads(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    world = NotesThreads(config.device_parameters)
    trainer = TinyTrainer(config, world=world)

    for step in (trainer.configure, trainer.setup):
        thread = threading.Thread(target=step, name=step.__name__)
        thread.start()
        thread.join()
    trainer.fit()

    assert set(world.threads) == {"configure", "setup", "MainThread"}


def threads_of_a_slow_call() -> tuple[str, list[str]]:
    world = NotesThreads(DeviceParameters(device="cpu"))
    world.launch()
    ranks = Coordination(world, "test")
    name = ranks.each_without_timeout(lambda: threading.current_thread().name)
    return name, world.threads


def test_a_function_without_timeout_finds_the_device_set() -> None:
    for thread, with_device in run_on_ranks(threads_of_a_slow_call, 2):
        assert thread in with_device
        assert thread != "MainThread"
