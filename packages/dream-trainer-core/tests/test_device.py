"""The device of a rank: which one it is, and in which threads it is set."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import Coordination, World, device
from dream_trainer.world.device import backends, claim, device_of_rank, num_devices


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
    monkeypatch.setattr(torch.accelerator, "set_device_index", calls.append)
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


class Machine:
    """What a rank sees of its machine: visible GPUs, the driver's files, CUDA in torch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: Path) -> None:
        self._patch = monkeypatch
        self._files = files
        monkeypatch.setattr(device, "_DEVICE_FILES", files)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        device._warn_once.cache_clear()  # noqa: SLF001
        self.shows(0)

    def shows(self, num_devices: int, kind: str = "cuda") -> None:
        found = torch.device(kind) if num_devices else None
        self._patch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
        self._patch.setattr(torch.accelerator, "device_count", lambda: num_devices)

    def has_gpu(self) -> None:
        (self._files / "nvidia0").touch()

    def has_torch_for(self, cuda: str | None) -> None:
        self._patch.setattr(torch.version, "cuda", cuda)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_rank_has_the_gpu_of_its_local_rank(machine: Machine, wanted: str) -> None:
    machine.shows(8)

    assert device_of_rank(wanted, 11, 3) == torch.device("cuda", 3)  # type: ignore[arg-type]
    assert device_of_rank("cpu", 11, 3) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["auto", "xpu"])
def test_xpus_are_accepted_as_gpus_are(machine: Machine, wanted: Any) -> None:
    machine.shows(2, "xpu")

    assert device_of_rank(wanted, 1, 1, 2) == torch.device("xpu", 1)
    assert backends(torch.device("xpu", 1)) == "cpu:gloo,xpu:xccl"
    with pytest.raises(RuntimeError, match="local rank 0 has no CUDA device: 0 are visible"):
        device_of_rank("cuda", 0, 0)


def test_mps_is_for_one_process(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.shows(1, "mps")

    assert device_of_rank("auto", 0, 0) == device_of_rank("mps", 0, 0) == torch.device("mps", 0)
    assert not caplog.records
    with pytest.raises(RuntimeError, match='device="mps" with 2 ranks: MPS has no collectives'):
        device_of_rank("mps", 1, 1, 2)
    assert device_of_rank("auto", 0, 0, 2) == torch.device("cpu")
    assert "is the CPU for 2 ranks: MPS has no collectives" in caplog.text


def test_an_accelerator_that_is_not_supported_is_not_taken(machine: Machine) -> None:
    machine.shows(8, "hpu")

    assert device_of_rank("auto", 0, 0) == torch.device("cpu")
    assert num_devices() == 0


def test_each_kind_of_device_has_its_backends() -> None:
    assert backends(torch.device("cpu")) == "gloo"
    assert backends(torch.device("cuda", 3)) == "cpu:gloo,cuda:nccl"


def test_a_rank_that_is_shown_one_gpu_has_that_one(machine: Machine) -> None:
    machine.shows(1)

    assert device_of_rank("auto", 11, 3) == torch.device("cuda", 0)


def test_more_ranks_of_torchrun_than_gpus_are_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.shows(1)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # all ranks inherit what is visible to torchrun

    with pytest.raises(RuntimeError, match="local rank 3 has no CUDA device: 1 are visible; start"):
        device_of_rank("auto", 11, 3)


def test_two_ranks_with_one_gpu_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        uuid = "01234567-89ab"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    store, gpu = HashStore(), torch.device("cuda", 0)
    claim(gpu, 2, store)
    claim(gpu, 2, store)

    with pytest.raises(
        RuntimeError, match=r"ranks 2 and 3 both use GPU 01234567-89ab; .*srun --gpu"
    ):
        claim(gpu, 3, store)


@pytest.mark.parametrize(
    ("cuda", "reason"),
    [(None, f"torch {torch.__version__} is a build without CUDA"), ("12.8", "run CUDA 12.8")],
    ids=["build", "driver"],
)
def test_a_gpu_that_isnt_used_is_warned_of_once(
    machine: Machine, caplog: pytest.LogCaptureFixture, cuda: str | None, reason: str
) -> None:
    machine.has_gpu()
    machine.has_torch_for(cuda)

    devices = {device_of_rank("auto", rank, rank) for rank in (1, 0, 0)}

    assert devices == {torch.device("cpu")}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.message
    assert 'set device="cpu" if the CPU is meant' in record.message


def test_no_gpu_and_a_hidden_gpu_are_no_warning(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    device_of_rank("auto", 0, 0)
    machine.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    device_of_rank("auto", 0, 0)

    assert not caplog.records


def test_a_gpu_that_is_wanted_and_not_there_is_refused_with_the_reason(machine: Machine) -> None:
    machine.has_torch_for("12.8")

    message = (
        r"no CUDA device: 0 are visible \(this machine shows no NVIDIA GPU\); .*device=\"cpu\""
    )
    with pytest.raises(RuntimeError, match=message):
        device_of_rank("cuda", 0, 0)
