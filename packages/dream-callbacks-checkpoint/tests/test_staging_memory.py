"""StagingMemory: exact sizes, reused, pinned where copies come from a GPU.

Without a GPU, fake CUDA tensors are staged, and a stand-in for CUDA's runtime notes what is pinned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dream_callbacks.checkpoint.staging_memory import StagingMemory


@dataclass
class Runtime:
    """Stands in for `torch.cuda.cudart()`."""

    status: int = 0
    pinned: dict[int, int] = field(default_factory=dict)
    num_calls: int = 0

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert address % 4096 == 0, "pages are locked"
        assert flags == 1
        self.pinned[address] = num_bytes
        self.num_calls += 1
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    return runtime


def on_gpu(**shapes: tuple[tuple[int, ...], torch.dtype]) -> dict[str, Tensor]:
    with FakeTensorMode():
        return {
            name: torch.empty(shape, dtype=dtype, device="cuda")
            for name, (shape, dtype) in shapes.items()
        }


MANY = {
    "matrix": ((5, 7), torch.float32),
    "scalar": ((), torch.float32),
    "odd": ((3,), torch.bfloat16),
    "mask": ((9,), torch.bool),
    "nothing": ((0, 4), torch.float32),
    "complex": ((2,), torch.complex64),
    "small": ((6,), torch.float8_e4m3fn),
}


def test_copies_of_cuda_tensors_lie_in_one_pinned_block_of_their_size(runtime: Runtime) -> None:
    originals = on_gpu(**MANY)

    copies = StagingMemory[str]().copies_of(originals)

    (num_bytes,) = runtime.pinned.values()
    (begin,) = runtime.pinned
    needed = sum(tensor.nbytes for tensor in originals.values())
    assert needed <= num_bytes < needed + 64 * len(originals)
    for name, copy in copies.items():
        assert copy.shape == originals[name].shape
        assert copy.dtype == originals[name].dtype
        assert copy.device == torch.device("cpu")
        # torch.save writes a whole storage, and DCP would copy a part of one once more.
        assert copy.untyped_storage().nbytes() == copy.nbytes
        if copy.nbytes:
            assert begin <= copy.data_ptr() <= copy.data_ptr() + copy.nbytes <= begin + num_bytes


def test_copies_dont_overlap(runtime: Runtime) -> None:
    copies = StagingMemory[str]().copies_of(on_gpu(**MANY))

    for number, copy in enumerate(copies.values()):
        copy.view(-1).view(torch.uint8).fill_(number)

    for number, copy in enumerate(copies.values()):
        assert copy.view(-1).view(torch.uint8).unique().tolist() == [number] * bool(copy.nbytes)


def test_the_next_save_reuses_the_memory(runtime: Runtime) -> None:
    memory = StagingMemory[str]()
    first = memory.copies_of({**on_gpu(**MANY), "host": torch.zeros(4)})

    second = memory.copies_of({**on_gpu(**MANY), "host": torch.ones(4)})

    assert all(second[name] is first[name] for name in first)
    assert runtime.num_calls == 1


def test_another_shape_gets_another_block_and_the_old_one_is_unpinned(runtime: Runtime) -> None:
    memory = StagingMemory[str]()
    before = memory.copies_of({**on_gpu(a=((4,), torch.float32)), "host": torch.zeros(4)})

    after = memory.copies_of({**on_gpu(a=((128,), torch.float32)), "host": torch.zeros(4)})

    assert after["a"].shape == (128,)
    assert after["host"] is before["host"]
    assert list(runtime.pinned.values()) == [512]


def test_released_memory_is_unpinned_and_may_be_used_again(runtime: Runtime) -> None:
    memory = StagingMemory[str]()
    memory.copies_of(on_gpu(**MANY))

    memory.release()
    assert runtime.pinned == {}

    assert memory.copies_of(on_gpu(**MANY)).keys() == MANY.keys()
    assert len(runtime.pinned) == 1


def test_host_tensors_need_no_pinned_memory(runtime: Runtime) -> None:
    copies = StagingMemory[str]().copies_of({"host": torch.zeros(3, 2, dtype=torch.float64)})

    assert copies["host"].shape == (3, 2)
    assert copies["host"].dtype is torch.float64
    assert runtime.num_calls == 0


def test_memory_that_cant_be_pinned_is_an_error(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: launched.append(device))
    runtime.status = 2
    message = r"0\.5 GB of host memory can't be pinned .*CUDA error 2.*CheckpointCallback"

    with pytest.raises(RuntimeError, match=message):
        StagingMemory[str]().copies_of(on_gpu(a=((1 << 27,), torch.float32)))
    assert launched == ["cuda"], "it clears the error, which CUDA would raise in training"
