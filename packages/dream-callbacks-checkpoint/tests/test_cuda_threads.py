"""Saving and restoring CUDA tensors in threads: the device is set, and nothing reads early.

Without a GPU, fake CUDA tensors and a world that notes its calls show what is done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import steps
from torch._subclasses.fake_tensor import FakeTensorMode
from training import CALLBACKS, LAYOUTS

from dream_callbacks.checkpoint import CheckpointParameters
from dream_callbacks.checkpoint.dcp import TensorPlan, read_tensors
from dream_callbacks.checkpoint.format.tensor_index import TensorIndex
from dream_callbacks.checkpoint.io.local_filesystem import LocalFilesystem
from dream_callbacks.checkpoint.staging_memory import StagingMemory
from dream_trainer.callbacks import CallbackCollection, Every
from dream_trainer.configs import DeviceParameters
from dream_trainer.testing import TinyTrainer, run_on_ranks, tiny_config
from dream_trainer.world import Coordination, World


class NotesThreads(World):
    """Notes the threads in which the device was set."""

    def __init__(self, parameters: DeviceParameters) -> None:
        super().__init__(parameters)
        self.threads: set[str] = set()

    def use_device(self) -> None:
        self.threads.add(threading.current_thread().name)
        super().use_device()


def threads_of_a_run(root: Path, callback: str, layout: str) -> tuple[set[str], set[str]]:
    """Threads that read or write tensors when a run saves and resumes; threads with a device."""
    touching: set[str] = set()

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: LocalFilesystem, folder: str, name: str) -> Any:
            if name.endswith(".distcp"):
                touching.add(threading.current_thread().name)
            return method(self, folder, name)

        return noted

    LocalFilesystem.create = noting(LocalFilesystem.create)  # type: ignore[method-assign]
    LocalFilesystem.open = noting(LocalFilesystem.open)  # type: ignore[method-assign]
    with_device: set[str] = set()
    for n_epochs in (1, 2):
        parameters = CheckpointParameters(every=Every(steps=4))
        config = tiny_config(
            root,
            CallbackCollection([CALLBACKS[callback](parameters)]),
            device=LAYOUTS[layout](),
            n_epochs=n_epochs,
        )
        world = NotesThreads(config.device_parameters)
        TinyTrainer(config, world=world).fit()
        with_device |= world.threads
        world.shutdown()
    return touching, with_device


@pytest.mark.parametrize("layout", ["single", "fsdp"])
@pytest.mark.parametrize("callback", ["sync", "async"])
def test_every_thread_that_touches_tensors_has_set_the_device(
    tmp_path: Path, callback: str, layout: str
) -> None:
    results = run_on_ranks(
        threads_of_a_run, 1 if layout == "single" else 2, tmp_path, callback, layout
    )

    assert steps(tmp_path)[-1] == 16
    for touching, with_device in results:
        assert touching <= with_device
        other = {("single", "async"): "checkpoint", ("single", "sync"): "MainThread"}
        assert other.get((layout, callback), "each-without-timeout") in touching


@pytest.fixture
def waited_for(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that were synchronized."""
    devices: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", devices.append)
    return devices


def plan_of(tensors: dict[str, torch.Tensor]) -> TensorPlan:
    world = World(DeviceParameters.SINGLE_DEVICE(device="cpu"))
    return TensorPlan.of_state(tensors, {name: (name,) for name in tensors}, Coordination(world))


class FakeMemory(StagingMemory[Any]):
    """Has fake tensors; nothing can be pinned here."""

    def copies_of(self, originals: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
        return {key: torch.empty(tensor.shape) for key, tensor in originals.items()}


TWO_DEVICES = {torch.device("cuda", 0), torch.device("cuda", 1)}


def test_staging_waits_for_the_copies_of_every_device(waited_for: list[torch.device]) -> None:
    with FakeTensorMode():
        tensors = {
            "first": torch.empty(4, device="cuda:0"),
            "second": torch.empty(3, device="cuda:1"),
            "third": torch.empty(2),
        }
        plan_of(tensors).stage(FakeMemory())

    assert set(waited_for) == TWO_DEVICES


def test_a_write_of_live_tensors_waits_for_training_on_every_device(
    waited_for: list[torch.device], tmp_path: Path
) -> None:
    class Stop(Exception):
        """Raised where the first byte would be written: fake tensors have none."""

    class NoFiles(LocalFilesystem):
        def create(self, folder: str, name: str) -> Any:
            raise Stop

    with FakeTensorMode():
        plan = plan_of(
            {
                "first": torch.empty(4, device="cuda:0"),
                "second": torch.empty(3, device="cuda:1"),
            }
        )
        with pytest.raises(Stop):
            plan.write(NoFiles(tmp_path), "")

    assert set(waited_for) == TWO_DEVICES


def test_a_write_of_staged_tensors_waits_for_no_device(
    waited_for: list[torch.device], tmp_path: Path
) -> None:
    plan = plan_of({"first": torch.ones(4)})
    plan.stage(StagingMemory())

    plan.write(LocalFilesystem(tmp_path), "")

    assert waited_for == []


def test_torch_copies_nothing_ahead_where_there_is_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Its loader that copies ahead asks for the current stream, which raises on this build.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plan = plan_of({"first": torch.ones(4)})

    results, _ = plan.write(LocalFilesystem(tmp_path), "")

    assert len(results) == 1


class FailsToFill(torch.Tensor):
    """A tensor whose device fails when it is filled."""

    error: Exception

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.Tensor.copy_:
            raise cls.error
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: device-side assert triggered"),
    ],
    ids=["memory", "assert"],
)
def test_an_error_of_the_device_isnt_called_damage(tmp_path: Path, error: Exception) -> None:
    plan, filesystem = plan_of({"first": torch.ones(4)}), LocalFilesystem(tmp_path)
    results, _ = plan.write(filesystem, "")
    plan.finish(filesystem, "", [results])
    assert plan.metadata is not None
    index = TensorIndex.of_save(plan.metadata, results)
    FailsToFill.error = error

    with pytest.raises(type(error), match="CUDA"):
        read_tensors(filesystem, "", index, {"first": torch.zeros(4).as_subclass(FailsToFill)})
