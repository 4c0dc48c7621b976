"""Random number generators: seeding, saving, and initial weights that no layout changes."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dream_trainer.world.torch_private import TorchDispatchMode


def seed_all(seed: int) -> None:
    """Seed Python's, torch's (all devices) and, if it is loaded, numpy's generators."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def use_deterministic_algorithms() -> None:
    """Let torch take only algorithms that give the same bits each time; raise where there is none.

    For the rest of the process, and before CUDA is used: cuBLAS reads its setting when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False  # it may choose another algorithm each time


def random_state() -> dict[str, Any]:
    """State of all generators of this process, its CUDA device's included, as plain data."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Continue all generators from what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the generators as they were, whatever is drawn inside."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


class FullTensorRandom(TorchDispatchMode):
    """Draws for a sharded or meta tensor the random numbers that the whole, real one would get.

    Without it, `nn.init` gives each rank of a CPU mesh the same shard, since all of them have
    the same seed, and weights depend on the layout on any device. Here each rank draws the full
    tensor, one at a time, and keeps its shard. What is drawn for a meta tensor is thrown away, so
    that the generators go on as they do after building the same model on the device.

    Memory: one full tensor at a time.

    Args:
        device: Where to draw: generators of different devices give different numbers.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        filled = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if filled is None:
            if torch.device(kwargs.get("device") or "cpu").type == "meta":
                func(*args, **{**kwargs, "device": self._device})
            return func(*args, **kwargs)
        if filled.is_meta:
            func(self._whole(filled), *args[1:], **kwargs)
            return func(*args, **kwargs)
        if not _is_sharded(filled):
            return func(*args, **kwargs)
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(filled, DTensor)
        whole = self._whole(filled)
        drawn = func(whole, *args[1:], **kwargs)
        mine = distribute_tensor(drawn, filled.device_mesh, filled.placements, src_data_rank=None)
        if drawn is not whole:  # x_like(), not x_()
            return mine
        filled.to_local().copy_(mine.to_local())
        return filled

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)


class LocalTensorRandom(TorchDispatchMode):
    """Draws for a sharded tensor only what this rank holds, and for a meta tensor nothing.

    Other numbers than FullTensorRandom's, from the same distributions, without its time and memory.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        filled = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if not is_random or filled is None or not _is_sharded(filled):
            return func(*args, **kwargs)
        from torch.distributed.tensor import DTensor

        assert isinstance(filled, DTensor)
        local = filled.to_local()
        drawn = func(local, *args[1:], **kwargs)
        if drawn is local:  # x_(), not x_like()
            return filled
        return DTensor.from_local(
            drawn,
            filled.device_mesh,
            filled.placements,
            run_check=False,
            shape=filled.shape,
            stride=filled.stride(),
        )


def _is_sharded(tensor: torch.Tensor) -> bool:
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
