"""Random number generators: seeding, saving, and initial weights independent of the layout."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dream_trainer.world.dtensors import as_dtensor
from dream_trainer.world.torch_private import TorchDispatchMode


def seed_all(seed: int) -> None:
    """Seed the generators of Python, torch (all devices) and, if it is imported, numpy."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def use_deterministic_algorithms() -> None:
    """Make torch use only deterministic algorithms, and raise where there is none.

    For the rest of the process. Call it before CUDA is used: cuBLAS reads its setting at start.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False  # may choose another algorithm each time


def random_state() -> dict[str, Any]:
    """State of all generators of this process, including its accelerator's, as plain data."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        # CUDA and XPU would start here, and in a forked process fail.
        if getattr(module, "is_initialized", module.is_available)():
            state[accelerator.type] = module.get_rng_state()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (name, keys.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore all generators from the result of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in state:
        torch.get_device_module(accelerator).set_rng_state(state[accelerator.type])
    if "numpy" in state:
        import numpy

        numpy.random.set_state(tuple(state["numpy"]))


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the generators on exit."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


class RandomStream:
    """The random numbers of one trainer, kept apart from those of others in this process.

    All draw from the same global generators. Inside `active`, these continue where the stream
    stopped, whatever was drawn in between.
    """

    _num_active = 0

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Draw from this stream inside; may be nested in that of another trainer."""
        outer = random_state() if RandomStream._num_active else None
        if self.state is not None:
            set_random_state(self.state)
        RandomStream._num_active += 1
        try:
            yield
        finally:
            RandomStream._num_active -= 1
            self.state = random_state()
            if outer is not None:
                set_random_state(outer)

    @contextmanager
    def peeked(self) -> Iterator[None]:
        """Draw from this stream inside; afterwards it, and the generators, are as before."""
        with random_state_kept():
            if self.state is not None:
                set_random_state(self.state)
            yield


class LocalTensorRandom(TorchDispatchMode):
    """Draws only this rank's shard of a sharded tensor, and nothing for a meta tensor.

    Other numbers than FullTensorInit, of the same distributions, without its time and memory.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        filled = args[0] if args else None
        sharded = as_dtensor(filled) if is_random else None
        if sharded is None:
            return func(*args, **kwargs)
        from torch.distributed.tensor import DTensor

        local = sharded.to_local()
        drawn = func(local, *args[1:], **kwargs)
        if drawn is local:  # x_(), not x_like()
            return sharded
        return DTensor.from_local(
            drawn,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
