"""Work on the device of a known length, and how long the host takes while the device is busy."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


@functools.cache
def cycles_per_ms() -> float:
    """Cycles of the device's clock in a millisecond, measured."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    num_cycles = 20_000_000
    torch.cuda._sleep(num_cycles)  # noqa: SLF001  # raises the clock
    start.record()
    torch.cuda._sleep(num_cycles)  # noqa: SLF001
    end.record()
    torch.cuda.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return num_cycles / elapsed_ms


def keep_busy(ms: float) -> None:
    """Queue a kernel that takes this long on the current stream."""
    torch.cuda._sleep(int(ms * cycles_per_ms()))  # noqa: SLF001


def host_ms(call: Callable[[], object], busy_ms: float = 200.0) -> float:
    """Milliseconds that a call takes on the host while the device is busy for `busy_ms`.

    It is called once before, so that memory is allocated.
    """
    cycles_per_ms()
    call()
    torch.cuda.synchronize()
    keep_busy(busy_ms)
    began_s = time.perf_counter()
    call()
    took_s = time.perf_counter() - began_s
    torch.cuda.synchronize()
    return took_s * 1e3
